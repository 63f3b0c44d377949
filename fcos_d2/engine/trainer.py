"""`Trainer`: Detectron2's `DefaultTrainer` with this package's data, evaluator and checkpoints."""

import contextlib
import logging
import os
import weakref

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, build_detection_test_loader
from detectron2.engine import HookBase, TrainerBase, hooks
from detectron2.engine.defaults import create_ddp_model
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter, EventWriter, JSONWriter, TensorboardXWriter
from detectron2.utils.logger import setup_logger
from fvcore.nn.precise_bn import get_bn_modules
from torch import nn
from torch.utils.data import DataLoader

from ..checkpoint import FCOSCheckpointer
from ..data import DetectionDatasetMapper, class_names, load_records
from ..data.loader import TrainLoader, build_train_loader
from ..evaluation import DetectionEvaluator
from ..evaluation.evaluator import ModelInfo
from ..evaluation.proposals import ProposalEvaluator
from ..files import dataset_slug
from ..modeling.optimize import inference_options, optimize_for_inference
from ..modeling.tta import FCOSWithTTA
from .compat import ResumableTrainer
from .ema import ModelEma, resume_ema
from .hooks import BestCheckpoint, EarlyStop, EvaluationWriter, best_metric, check_hooks
from .train_loop import TrainLoop

logger = logging.getLogger(__name__)


class Trainer(ResumableTrainer):
    """Train FCOS from a config that :func:`fcos_d2.engine.setup` has checked."""

    def __init__(self, cfg: CfgNode):
        """Build everything in the order of ``DefaultTrainer.__init__``.

        It is not called, because it creates Detectron2's own training step and checkpointer, up to
        main, and has no method to override for them.

        Raises:
            ValueError: an invalid SOLVER.AMP.PRECISION, MODEL_EMA.*, TEST.BEST_METRIC or
                TEST.EARLY_STOP_PATIENCE, or a model on the CPU in a process group for CUDA.
        """
        check_hooks(cfg)
        TrainerBase.__init__(self)
        if not logging.getLogger("detectron2").isEnabledFor(logging.INFO):
            setup_logger()
        self.cfg = cfg = self.auto_scale_workers(cfg, comm.get_world_size())
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
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.register_hooks(self.build_hooks())

    def resume_or_load(self, resume: bool = True) -> None:
        """Load as Detectron2 does; a resumed run continues with the next batch.

        Raises:
            RuntimeError: the ranks found different checkpoints.
        """
        super().resume_or_load(resume)
        if self.ema is not None and self.ema.num_updates == 0:
            self.ema.reset()  # to the loaded weights
        starts = comm.all_gather(self.start_iter)
        if len(set(starts)) > 1:
            raise RuntimeError(
                f"--resume: the ranks would continue from the iterations {starts}. All machines "
                f"need the checkpoints of OUTPUT_DIR {self.cfg.OUTPUT_DIR}: put it on a shared "
                "disk, or copy it to each of them."
            )
        self._trainer.data_loader.start_iter = self.start_iter

    def state_dict(self) -> dict:
        """Return all that a resumed run needs besides the weights of the checkpoint."""
        state = super().state_dict()
        # After the last iteration Detectron2 has counted one more.
        state["iteration"] = min(self.iter, self.max_iter - 1)
        if self.ema is not None:
            state["ema"] = self.ema.state_dict()
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        """Load the result of :meth:`state_dict`."""
        super().load_state_dict(state_dict)
        resume_ema(self.ema, state_dict.get("ema"), self.checkpointer.model)

    def train(self) -> dict | None:
        """Train up to SOLVER.MAX_ITER, or until TEST.EARLY_STOP_PATIENCE is exhausted.

        Returns:
            Results of the last evaluation, in the form of :func:`evaluate`, on the main process;
            None without an evaluation.
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
        """Let the hooks finish; do not evaluate a run that failed or stopped early.

        Detectron2 evaluates a run that failed in its last iteration, where other ranks may be gone
        and the weights may be useless.
        """
        self.storage.iter = self.iter
        for hook in self._hooks:
            if self.iter == self.max_iter or not isinstance(hook, hooks.EvalHook):
                hook.after_train()

    def build_hooks(self) -> list[HookBase | None]:
        """Build Detectron2's hooks in its order, with averaging, best checkpoint and early stop."""
        cfg, main_process = self.cfg, comm.is_main_process()
        metric, ema = best_metric(cfg), self.ema
        best = None
        if metric:
            best = BestCheckpoint(self.checkpointer, metric, cfg.TEST.EARLY_STOP_PATIENCE)

        def evaluate_weights() -> dict:
            info = ModelInfo(iteration=min(self.iter, self.max_iter - 1), ema=ema is not None)
            with ema.applied() if ema else contextlib.nullcontext():
                results = self._test(cfg, self.model, info)
            if best is not None:
                best.update(results)
            self._last_eval_results = results
            return results

        return [
            hooks.IterationTimer(),
            hooks.CallbackHook(after_step=lambda _: ema.update()) if ema else None,
            hooks.LRScheduler(),
            self._build_precise_bn(),
            # After everything that changes weights, and before an evaluation that may fail.
            hooks.PeriodicCheckpointer(self.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD)
            if main_process
            else None,
            best,
            hooks.EvalHook(cfg.TEST.EVAL_PERIOD, evaluate_weights),
            # Last, so that evaluation results are written.
            EvaluationWriter(self.build_writers(), cfg.TEST.EVAL_PERIOD) if main_process else None,
        ]

    def _build_precise_bn(self) -> HookBase | None:
        cfg = self.cfg.clone()
        if not cfg.TEST.PRECISE_BN.ENABLED or not get_bn_modules(self.model):
            return None
        cfg.defrost()
        cfg.DATALOADER.NUM_WORKERS = 0  # a second loader beside that of the training
        loader = self.build_train_loader(cfg)
        period, num_iter = cfg.TEST.EVAL_PERIOD, cfg.TEST.PRECISE_BN.NUM_ITER
        return hooks.PreciseBN(period, self.model, loader, num_iter)

    @classmethod
    def _test(cls, cfg: CfgNode, model: nn.Module, info: ModelInfo) -> dict:
        """Run :meth:`test` with evaluators that write ``info`` into ``evaluation.json``."""
        names = cfg.DATASETS.TEST
        return cls.test(cfg, model, [cls.build_evaluator(cfg, name, info) for name in names])

    def build_writers(self) -> list[EventWriter]:
        """Build Detectron2's writers; metrics.json gets the values of each written iteration.

        By default they are medians of 20 iterations, which a resumed run does not have.
        """
        return [
            CommonMetricPrinter(self.max_iter),
            JSONWriter(os.path.join(self.cfg.OUTPUT_DIR, "metrics.json"), window_size=1),
            TensorboardXWriter(self.cfg.OUTPUT_DIR),
        ]

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """Build the model, in channels-last memory format with MODEL.CHANNELS_LAST.

        Images stay as they are: a convolution adopts the memory format of its weights.
        """
        model = super().build_model(cfg)
        return model.to(memory_format=torch.channels_last) if cfg.MODEL.CHANNELS_LAST else model

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> TrainLoader:
        """Build the loader of DATASETS.TRAIN."""
        return build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> DataLoader:
        """Build the loader of one of DATASETS.TEST, one image per batch."""
        return build_detection_test_loader(
            load_records(dataset_name, skip_bad_boxes=cfg.DATASETS.SKIP_BAD_BOXES),
            mapper=DetectionDatasetMapper(cfg, is_train=False),
            num_workers=cfg.DATALOADER.NUM_WORKERS,
        )

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, model_info: ModelInfo | None = None
    ) -> DetectionEvaluator | ProposalEvaluator:
        """Build the evaluator of one of DATASETS.TEST, which writes to OUTPUT_DIR/inference.

        The proposals of a ``ProposalNetwork`` are evaluated by their recall.

        Args:
            cfg: of the run.
            dataset_name: registered name.
            model_info: the evaluated model, for ``evaluation.json``. A subclass may ignore it.
        """
        folder = os.path.join(cfg.OUTPUT_DIR, "inference", dataset_slug(dataset_name))
        json_file = MetadataCatalog.get(dataset_name).get("json_file")
        records = load_records(dataset_name, skip_bad_boxes=cfg.DATASETS.SKIP_BAD_BOXES)
        if cfg.MODEL.META_ARCHITECTURE == "ProposalNetwork":
            return ProposalEvaluator(dataset_name, records, folder, json_file)
        names = class_names(dataset_name)
        return DetectionEvaluator(
            dataset_name, records, names, folder, json_file, model_info=model_info
        )


def distribute(model: nn.Module) -> nn.Module:
    """Wrap a model so that gradients are averaged over the ranks, if there are several.

    Detectron2 alone would name a GPU for a model on the CPU as well.

    Raises:
        ValueError: a model on the CPU in a process group for CUDA.
    """
    device = next(model.parameters()).device.type
    if comm.get_world_size() > 1 and device == "cpu" and dist.get_backend() == "nccl":
        raise ValueError(
            "MODEL.DEVICE is cpu, but the process group uses CUDA: hide its devices with "
            "CUDA_VISIBLE_DEVICES=''."
        )
    device_ids = None if device == "cpu" else [torch.cuda.current_device()]
    return create_ddp_model(model, broadcast_buffers=False, device_ids=device_ids)


def evaluate(cfg: CfgNode, resume: bool = False) -> dict:
    """Evaluate MODEL.WEIGHTS, or with ``resume`` the last checkpoint of OUTPUT_DIR.

    TEST.OPTIMIZE optimizes the model, and with TEST.AUG.ENABLED results and files are those of
    test-time augmentation (:class:`FCOSWithTTA`). Evaluations during training use neither.

    Returns:
        Results per DATASETS.TEST, or those of the only one.

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
        cfg.INPUT.MIN_SIZE_TEST = 0  # each view is resized from the original image
    return Trainer._test(cfg, model, info)
