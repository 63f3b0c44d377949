"""Training, evaluation and prediction."""

from detectron2.engine import default_argument_parser

from .launch import launch
from .scaling import scale_to_batch_size
from .setup import load_cfg, prepare_datasets, setup, shared_class_names
from .train_loop import TrainLoop
from .trainer import Trainer, evaluate

__all__ = [
    "TrainLoop",
    "Trainer",
    "default_argument_parser",
    "evaluate",
    "launch",
    "load_cfg",
    "prepare_datasets",
    "scale_to_batch_size",
    "setup",
    "shared_class_names",
]
