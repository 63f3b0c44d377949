"""The evaluator of a dataset: COCO's table and PASCAL VOC's own AP over one set of predictions."""

from .coco import coco_table
from .evaluator import DetectionEvaluator
from .files import atomic_path, dataset_slug
from .voc import voc_average_precision

__all__ = [
    "DetectionEvaluator",
    "atomic_path",
    "coco_table",
    "dataset_slug",
    "voc_average_precision",
]
