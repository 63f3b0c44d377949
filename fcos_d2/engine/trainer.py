"""`Trainer`: Detectron2's `DefaultTrainer` with this package's data, evaluator and checkpoints."""

import logging
import os
import weakref

from detectron2.data import DatasetMapper, MetadataCatalog, build_detection_test_loader
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.utils.events import CommonMetricPrinter, EventWriter, JSONWriter, TensorboardXWriter
from torch import nn

from ..checkpoint import FCOSCheckpointer
from ..data import class_names, load_records
from ..data.loader import TrainLoader, build_train_loader
from ..evaluation import DetectionEvaluator
from ..files import dataset_slug

logger = logging.getLogger(__name__)


class Trainer(DefaultTrainer):
    """Train FCOS from a config that :func:`fcos_d2.engine.setup` has checked."""

    def resume_or_load(self, resume: bool = True) -> None:
        """Load as Detectron2 does; a resumed run goes on with the batch that comes next."""
        super().resume_or_load(resume)
        self._trainer.data_loader.start_iter = self.start_iter

    def state_dict(self) -> dict:
        """Return what a checkpoint keeps to resume from, the optimizer's state included.

        Detectron2 v0.5 leaves that out, and a resumed run would start without momentum.
        """
        return {**super().state_dict(), "_trainer": self._trainer.state_dict()}

    def load_state_dict(self, state_dict: dict) -> None:
        """Take up what :meth:`state_dict` gave."""
        super().load_state_dict(state_dict)
        self._trainer.load_state_dict(state_dict["_trainer"])

    def build_hooks(self) -> list[HookBase]:
        """Build Detectron2's hooks on a checkpointer that keeps the class names.

        ``DefaultTrainer`` has no method that builds the checkpointer. This is the one place
        between the line that creates it and the hooks that use it.
        """
        self.checkpointer = FCOSCheckpointer(
            self._trainer.model,
            self.cfg.OUTPUT_DIR,
            class_names=class_names(self.cfg.DATASETS.TRAIN[0]),
            trainer=weakref.proxy(self),
        )
        return super().build_hooks()

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
    def build_train_loader(cls, cfg) -> TrainLoader:
        """Build the loader of DATASETS.TRAIN."""
        return build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg, dataset_name: str):
        """Build the loader of one of DATASETS.TEST, one image a batch."""
        return build_detection_test_loader(
            load_records(dataset_name),
            mapper=DatasetMapper(cfg, is_train=False),
            num_workers=cfg.DATALOADER.NUM_WORKERS,
        )

    @classmethod
    def build_evaluator(cls, cfg, dataset_name: str) -> DetectionEvaluator:
        """Build the evaluator of one of DATASETS.TEST, writing to OUTPUT_DIR/inference."""
        return DetectionEvaluator(
            dataset_name,
            load_records(dataset_name),
            class_names(dataset_name),
            output_dir=os.path.join(cfg.OUTPUT_DIR, "inference", dataset_slug(dataset_name)),
            json_file=MetadataCatalog.get(dataset_name).get("json_file"),
        )


def evaluate(cfg, resume: bool = False) -> dict:
    """Evaluate MODEL.WEIGHTS, or with ``resume`` the last checkpoint of OUTPUT_DIR.

    Returns:
        The results of each of DATASETS.TEST (of the only one, where there is one).
    """
    model: nn.Module = Trainer.build_model(cfg)
    checkpointer = FCOSCheckpointer(
        model, cfg.OUTPUT_DIR, class_names=class_names(cfg.DATASETS.TEST[0]), for_inference=True
    )
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    return Trainer.test(cfg, model)
