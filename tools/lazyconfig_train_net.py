"""Train or evaluate FCOS from a lazy config, as Detectron2's command of this name does.

python tools/lazyconfig_train_net.py --config-file configs/lazy/fcos_r50_voc.py [--num-gpus N]
    [--resume] [--eval-only] [train.max_iter=100 dataloader.train.total_batch_size=8 ...]
"""

import contextlib
import logging
import os
import sys

# First, because fcos_d2 filters warnings of Detectron2.
from fcos_d2.checkpoint import FCOSCheckpointer

# isort: split
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import HookBase, default_setup, default_writers, hooks
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig, OmegaConf

from fcos_d2.engine import TrainLoop, default_argument_parser, launch, shared_class_names
from fcos_d2.engine.commands import record_command
from fcos_d2.engine.ema import ModelEma
from fcos_d2.engine.trainer import distribute
from fcos_d2.files import dataset_slug

PARTS = ("model", "dataloader", "optimizer", "lr_multiplier", "train")
NUM_CLASSES = "model.proposal_generator.head.num_classes"

logger = logging.getLogger("fcos_d2")


def load_config(config_file, overrides) -> DictConfig:
    """Load a lazy config, override it by ``key=value`` and check that it is complete."""
    cfg = LazyConfig.apply_overrides(LazyConfig.load(config_file), overrides)
    missing = [part for part in PARTS if part not in cfg]
    if missing:
        raise ValueError(
            f"{config_file} has no {', '.join(missing)}: a lazy config has {', '.join(PARTS)} "
            "(see configs/lazy/fcos_r50_voc.py). Yaml recipes are for train_net.py."
        )
    return cfg


def check_classes(cfg, eval_only: bool) -> list[str]:
    """Return the class names that all data sets share.

    Raises:
        ValueError: data sets of different classes, or the model has another number of classes.
    """
    names, skip = [], False
    for part in ("test",) if eval_only else ("train", "test"):
        dataset = cfg.dataloader[part].dataset
        names += [dataset.names] if isinstance(dataset.names, str) else list(dataset.names)
        skip |= dataset.get("skip_bad_boxes", False)
    class_names = shared_class_names(names, skip_bad_boxes=skip)
    num_classes = OmegaConf.select(cfg, NUM_CLASSES)
    if num_classes != len(class_names):
        raise ValueError(
            f"{NUM_CLASSES} is {num_classes}, but {names[0]} has {len(class_names)} classes "
            f"({', '.join(class_names)}): set {NUM_CLASSES}={len(class_names)}."
        )
    return class_names


def do_test(cfg, model, ema=None):
    """Evaluate, with averaged weights if there are; files go to ``train.output_dir``/inference."""
    dataset = dataset_slug(cfg.dataloader.evaluator.dataset_name)
    cfg.dataloader.evaluator.output_dir = os.path.join(cfg.train.output_dir, "inference", dataset)
    loader, evaluator = instantiate(cfg.dataloader.test), instantiate(cfg.dataloader.evaluator)
    with ema.applied() if ema else contextlib.nullcontext():
        results = inference_on_dataset(model, loader, evaluator)
    if comm.is_main_process():
        print_csv_format(results)
    return results


class EmaHook(HookBase):
    """Update the average of the weights after each step, and save its state in checkpoints."""

    def __init__(self, ema: ModelEma):
        self.ema = ema

    def after_step(self):
        self.ema.update()

    def state_dict(self):
        return self.ema.state_dict()

    def load_state_dict(self, state):
        self.ema.load_state_dict(state)


def clip_gradients(optimizer: torch.optim.Optimizer, max_norm: float) -> None:
    """Clip the gradient of each parameter before each step, as SOLVER.CLIP_GRADIENTS does."""

    def clip(optimizer, *_):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                torch.nn.utils.clip_grad_norm_(parameter, max_norm)

    optimizer.register_step_pre_hook(clip)


def do_train(args, cfg, class_names):
    """Train from ``train.init_checkpoint``, or with ``--resume`` from the last checkpoint."""
    model = instantiate(cfg.model).to(cfg.train.device)
    logger.info("Model:\n%s", model)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    if cfg.train.clip_grad_norm > 0:
        clip_gradients(optimizer, cfg.train.clip_grad_norm)
    train_loader = instantiate(cfg.dataloader.train)
    precision = cfg.train.amp.precision if cfg.train.amp.enabled else None
    trainer = TrainLoop(distribute(model), train_loader, optimizer, precision)
    ema = ModelEma(model, cfg.train.ema.decay) if cfg.train.ema.enabled else None
    checkpointer = FCOSCheckpointer(
        model,
        cfg.train.output_dir,
        class_names=class_names,
        get_weights=ema.weights if ema else None,
        trainer=trainer,
    )

    is_main = comm.is_main_process()
    writers = default_writers(cfg.train.output_dir, cfg.train.max_iter) if is_main else []
    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            EmaHook(ema) if ema else None,
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer) if is_main else None,
            hooks.EvalHook(cfg.train.eval_period, lambda: do_test(cfg, model, ema)),
            hooks.PeriodicWriter(writers, period=cfg.train.log_period) if is_main else None,
        ]
    )

    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=args.resume)
    resumed = args.resume and checkpointer.has_checkpoint()
    if ema and not resumed:
        ema.reset()  # to the weights that were loaded
    train_loader.start_iter = trainer.iter + 1 if resumed else 0
    trainer.train(train_loader.start_iter, cfg.train.max_iter)


def main(args):
    """Run on one rank, with Detectron2's own arguments."""
    cfg = load_config(args.config_file, args.opts)
    if cfg.train.device.startswith("cuda") and not torch.cuda.is_available():
        logger.warning("No CUDA device: running on the CPU.")
        cfg.train.device = "cpu"
    class_names, output_dir = check_classes(cfg, args.eval_only), cfg.train.output_dir
    default_setup(cfg, args)
    setup_logger(output_dir, distributed_rank=comm.get_rank(), name="fcos_d2")
    if comm.is_main_process():
        record_command(output_dir, sys.argv, cfg.train.device)
    if not args.eval_only:
        return do_train(args, cfg, class_names)
    model = instantiate(cfg.model).to(cfg.train.device)
    checkpointer = FCOSCheckpointer(model, output_dir, class_names=class_names, for_inference=True)
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=args.resume)
    return do_test(cfg, model)


if __name__ == "__main__":
    args = default_argument_parser().parse_args()
    launch(main, args, load_config(args.config_file, args.opts).train.output_dir)
