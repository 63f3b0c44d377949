"""Evaluators, their result files, and COCO's and PASCAL VOC's tables."""

from .coco_evaluation import coco_table
from .evaluator import DetectionEvaluator, ModelInfo
from .proposals import ProposalEvaluator
from .voc_evaluation import voc_average_precision

__all__ = [
    "DetectionEvaluator",
    "ModelInfo",
    "ProposalEvaluator",
    "coco_table",
    "voc_average_precision",
]
