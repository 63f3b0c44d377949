"""The evaluator of a dataset: COCO's table and PASCAL VOC's own AP over one set of predictions."""

from .coco import coco_table
from .evaluator import DetectionEvaluator
from .proposals import ProposalEvaluator
from .voc import voc_average_precision

__all__ = [
    "DetectionEvaluator",
    "ProposalEvaluator",
    "coco_table",
    "voc_average_precision",
]
