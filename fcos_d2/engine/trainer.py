"""`Trainer`: Detectron2's `DefaultTrainer` with this package's data, evaluator and checkpoints."""

import contextlib
import logging
import os
import weakref

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, build_detection_test_loader
from detectron2.engine import DefaultTrainer, HookBase, TrainerBase
from detectron2.engine.defaults import create_ddp_model
from detectron2.engine.hooks import CallbackHook, EvalHook, PeriodicWriter
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter, EventWriter, JSONWriter, TensorboardXWriter
from detectron2.utils.logger import setup_logger
from torch import nn

from ..checkpoint import FCOSCheckpointer
from ..data import DetectionDatasetMapper, class_names, load_records
from ..data.loader import TrainLoader, build_train_loader
from ..evaluation import DetectionEvaluator
from ..evaluation.evaluator import ModelInfo
from ..evaluation.proposals import ProposalEvaluator
from ..files import dataset_slug
from ..modeling.optimize import inference_options, optimize_for_inference
from ..modeling.tta import FCOSWithTTA
from .ema import ModelEma, resume_ema
from .hooks import BestCheckpoint, EarlyStop, best_metric, check_hooks
from .train_loop import TrainLoop

logger = logging.getLogger(__name__)


class Trainer(DefaultTrainer):
    """Train FCOS from a config that :func:`fcos_d2.engine.setup` has checked."""

    def __init__(self, cfg: CfgNode):
        """Build everything, in the order of ``DefaultTrainer``.

        That one makes its training step and its checkpointer in this method, and has no other to
        override for them.

        Raises:
            ValueError: SOLVER.AMP.PRECISION does not suit the device, or the model is on the CPU
                while the processes are joined over CUDA; MODEL_EMA.*, TEST.BEST_METRIC or
                TEST.EARLY_STOP_PATIENCE has no meaning.
        """
        check_hooks(cfg)
        TrainerBase.__init__(self)
        if not logging.getLogger("detectron2").isEnabledFor(logging.INFO):
            setup_logger()
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        self._trainer = TrainLoop(
            distribute(model),
            self.build_train_loader(cfg),
            optimizer,
            precision=cfg.SOLVER.AMP.PRECISION if cfg.SOLVER.AMP.ENABLED else None,
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.ema = ModelEma(model, cfg.MODEL_EMA.DECAY) if cfg.MODEL_EMA.ENABLED else None
        self.checkpointer = FCOSCheckpointer(
            model,
            cfg.OUTPUT_DIR,
            class_names=class_names(cfg.DATASETS.TRAIN[0]),
            cfg=cfg,
            get_weights=self.ema.weights if self.ema else None,
            trainer=weakref.proxy(self),
        )
        self._last_eval_results: dict | None = None
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    def resume_or_load(self, resume: bool = True) -> None:
        """Load as Detectron2 does; a resumed run goes on with the batch that comes next.

        Raises:
            RuntimeError: the ranks found different checkpoints.
        """
        super().resume_or_load(resume)
        if self.ema is not None and self.ema.num_updates == 0:
            self.ema.reset()  # to the weights that were loaded
        starts = comm.all_gather(self.start_iter)
        if len(set(starts)) > 1:
            raise RuntimeError(
                f"--resume: the ranks would go on from the iterations {starts}. All machines need "
                f"the checkpoints of OUTPUT_DIR {self.cfg.OUTPUT_DIR}: put it on a shared disk, or "
                "copy it to each of them."
            )
        self._trainer.data_loader.start_iter = self.start_iter

    def state_dict(self) -> dict:
        """Return what a checkpoint keeps to resume from, the optimizer's state included.

        Detectron2 v0.5 leaves that out, and a resumed run would start without momentum.
        """
        state = {**super().state_dict(), "_trainer": self._trainer.state_dict()}
        # After the last iteration Detectron2 counts one more.
        state["iteration"] = min(self.iter, self.max_iter - 1)
        if self.ema is not None:
            state["ema"] = self.ema.state_dict()
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        """Take up what :meth:`state_dict` gave."""
        super().load_state_dict(state_dict)
        self._trainer.load_state_dict(state_dict["_trainer"])
        resume_ema(self.ema, state_dict.get("ema"), self.checkpointer.model)

    def train(self) -> dict | None:
        """Train up to SOLVER.MAX_ITER, or until TEST.EARLY_STOP_PATIENCE is used up.

        Returns:
            The results of the last evaluation, as :func:`evaluate` gives them, on the main process;
            None where there was none.
        """
        try:
            TrainerBase.train(self, self.start_iter, self.max_iter)
        except EarlyStop as stop:
            logger.info("%s", stop)
        if self.cfg.TEST.EXPECTED_RESULTS and comm.is_main_process():
            assert self._last_eval_results is not None, "There was no evaluation to verify."
            verify_results(self.cfg, self._last_eval_results)
        return self._last_eval_results

    def after_train(self) -> None:
        """Let the hooks finish; a run that failed, or that stopped early, is not evaluated.

        Detectron2 evaluates it if it failed in its last iteration, where other ranks may be gone
        and the weights may be of no use.
        """
        self.storage.iter = self.iter
        for hook in self._hooks:
            if self.iter == self.max_iter or not isinstance(hook, EvalHook):
                hook.after_train()

    def build_hooks(self) -> list[HookBase | None]:
        """Build Detectron2's hooks, and those of MODEL_EMA, TEST.BEST_METRIC and EARLY_STOP_*."""
        hooks = super().build_hooks()
        at = next(i for i, hook in enumerate(hooks) if isinstance(hook, EvalHook))
        metric = best_metric(self.cfg)
        best = None
        if metric:
            best = BestCheckpoint(self.checkpointer, metric, self.cfg.TEST.EARLY_STOP_PATIENCE)
        hooks[at] = EvalHook(self.cfg.TEST.EVAL_PERIOD, lambda: self._evaluate(best))
        hooks.insert(at, best)
        if isinstance(hooks[-1], PeriodicWriter):  # on the main process
            hooks[-1] = _Writer(hooks[-1]._writers)
        if self.ema is not None:
            update = self.ema.update
            # Behind the timer, and before the weights are saved.
            hooks.insert(1, CallbackHook(after_step=lambda _: update()))
        return hooks

    def _evaluate(self, best: BestCheckpoint | None) -> dict:
        iteration = min(self.iter, self.max_iter - 1)
        info = ModelInfo(iteration=iteration, ema=self.ema is not None)
        with self.ema.applied() if self.ema else contextlib.nullcontext():
            self._last_eval_results = self._test(self.cfg, self.model, info)
        if best is not None:
            best.judge(self._last_eval_results)
        return self._last_eval_results

    @classmethod
    def _test(cls, cfg: CfgNode, model: nn.Module, info: ModelInfo) -> dict:
        """Test as :meth:`test` does; ``evaluation.json`` says what it was that was tested."""
        evaluators = [cls.build_evaluator(cfg, name) for name in cfg.DATASETS.TEST]
        for evaluator in evaluators:
            if isinstance(evaluator, DetectionEvaluator):
                evaluator.model_info = info
        return cls.test(cfg, model, evaluators)

    def build_writers(self) -> list[EventWriter]:
        """Build Detectron2's writers; metrics.json gets each written iteration's own values.

        By default they are medians of the last 20 iterations, which a resumed run does not know.
        """
        return [
            CommonMetricPrinter(self.max_iter),
            JSONWriter(os.path.join(self.cfg.OUTPUT_DIR, "metrics.json"), window_size=1),
            TensorboardXWriter(self.cfg.OUTPUT_DIR),
        ]

    @classmethod
    def build_model(cls, cfg) -> nn.Module:
        """Build the model; MODEL.CHANNELS_LAST says how its weights lie in memory.

        The images need no change: a convolution takes the memory format of its weights, and gives
        it to the feature maps.
        """
        model = super().build_model(cfg)
        return model.to(memory_format=torch.channels_last) if cfg.MODEL.CHANNELS_LAST else model

    @classmethod
    def build_train_loader(cls, cfg) -> TrainLoader:
        """Build the loader of DATASETS.TRAIN."""
        return build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg, dataset_name: str):
        """Build the loader of one of DATASETS.TEST, one image a batch."""
        return build_detection_test_loader(
            load_records(dataset_name, skip_bad_boxes=cfg.DATASETS.SKIP_BAD_BOXES),
            mapper=DetectionDatasetMapper(cfg, is_train=False),
            num_workers=cfg.DATALOADER.NUM_WORKERS,
        )

    @classmethod
    def build_evaluator(cls, cfg, dataset_name: str) -> DetectionEvaluator | ProposalEvaluator:
        """Build the evaluator of one of DATASETS.TEST, writing to OUTPUT_DIR/inference.

        What a ``ProposalNetwork`` gives is measured by its recall.
        """
        options = {
            "output_dir": os.path.join(cfg.OUTPUT_DIR, "inference", dataset_slug(dataset_name)),
            "json_file": MetadataCatalog.get(dataset_name).get("json_file"),
        }
        records = load_records(dataset_name, skip_bad_boxes=cfg.DATASETS.SKIP_BAD_BOXES)
        if cfg.MODEL.META_ARCHITECTURE == "ProposalNetwork":
            return ProposalEvaluator(dataset_name, records, **options)
        return DetectionEvaluator(dataset_name, records, class_names(dataset_name), **options)


class _Writer(PeriodicWriter):
    """Writes after each evaluation too, so that hooks behind it find it in metrics.json."""

    def after_step(self) -> None:
        period = self.trainer.cfg.TEST.EVAL_PERIOD
        if period > 0 and (self.trainer.iter + 1) % period == 0:
            for writer in self._writers:
                writer.write()
        else:
            super().after_step()


def distribute(model: nn.Module) -> nn.Module:
    """Wrap a model so that gradients are averaged over ranks, where there are several.

    The device is named since Detectron2 would ask for the rank on this machine, which v0.5 does
    not know under torchrun.
    """
    device = next(model.parameters()).device.type
    if comm.get_world_size() > 1 and device == "cpu" and dist.get_backend() == "nccl":
        raise ValueError(
            "MODEL.DEVICE is cpu, but the processes are joined over CUDA: hide its devices with "
            "CUDA_VISIBLE_DEVICES=''."
        )
    return create_ddp_model(
        model,
        broadcast_buffers=False,
        device_ids=None if device == "cpu" else [torch.cuda.current_device()],
    )


def evaluate(cfg, resume: bool = False) -> dict:
    """Evaluate MODEL.WEIGHTS, or with ``resume`` the last checkpoint of OUTPUT_DIR.

    The model is optimized as TEST.OPTIMIZE says. With TEST.AUG.ENABLED, results
    and files are those of test-time augmentation (:class:`FCOSWithTTA`). The evaluations during
    training know neither.

    Returns:
        The results of each of DATASETS.TEST (of the only one, where there is one).

    Raises:
        ValueError: TEST.OPTIMIZE or TEST.AUG is not supported.
        RuntimeError: TEST.OPTIMIZE with "+compile" where ``torch.compile`` does not work.
    """
    options = inference_options(cfg)
    model: nn.Module = Trainer.build_model(cfg)
    checkpointer = FCOSCheckpointer(
        model,
        cfg.OUTPUT_DIR,
        class_names=class_names(cfg.DATASETS.TEST[0]),
        cfg=cfg,
        for_inference=True,
    )
    resume = resume and checkpointer.has_checkpoint()
    weights = checkpointer.get_checkpoint_file() if resume else cfg.MODEL.WEIGHTS
    loaded = checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    info = ModelInfo(
        weights,
        loaded.get("iteration"),
        ema="ema" in loaded["trainer"] if "trainer" in loaded else None,
        tta=cfg.TEST.AUG.ENABLED,
        optimize=cfg.TEST.OPTIMIZE,
    )
    if options:
        model = optimize_for_inference(model, **options)
    if cfg.TEST.AUG.ENABLED:
        model = FCOSWithTTA(cfg, model)
        cfg = cfg.clone()
        cfg.defrost()
        cfg.INPUT.MIN_SIZE_TEST = 0  # each view is resized from the image as it is
    return Trainer._test(cfg, model, info)
