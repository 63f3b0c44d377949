"""Training, evaluation and prediction."""

from .scaling import scale_to_batch_size
from .setup import load_cfg, prepare_datasets, setup
from .trainer import Trainer, evaluate

__all__ = ["Trainer", "evaluate", "load_cfg", "prepare_datasets", "scale_to_batch_size", "setup"]
