"""Data sources, their checks, and the loaders of training."""

from .dataset_mapper import DetectionDatasetMapper
from .findings import DataError, Finding
from .loader import TrainLoader, build_train_loader, get_records
from .sources import class_names, load_records, register_source

__all__ = [
    "DataError",
    "DetectionDatasetMapper",
    "Finding",
    "TrainLoader",
    "build_train_loader",
    "class_names",
    "get_records",
    "load_records",
    "register_source",
]
