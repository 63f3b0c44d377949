"""The evaluator of a dataset: COCO's table and PASCAL VOC's own AP over one set of predictions."""

from .coco import coco_table
from .evaluator import DetectionEvaluator
from .voc import voc_average_precision

__all__ = [
    "DetectionEvaluator",
    "coco_table",
    "voc_average_precision",
]
