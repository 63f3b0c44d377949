"""Error analysis: precision-recall curves, confusions, error types, calibration, image ranking."""

from .calibration import Calibration, calibration
from .confusion import confusion_matrix
from .errors import ERROR_TYPES, ErrorBreakdown, error_breakdown
from .image_ranking import rank_images
from .matching import ground_truth, match_detections
from .precision_recall import PrecisionRecall, precision_recall

__all__ = [
    "ERROR_TYPES",
    "Calibration",
    "ErrorBreakdown",
    "PrecisionRecall",
    "calibration",
    "confusion_matrix",
    "error_breakdown",
    "ground_truth",
    "match_detections",
    "precision_recall",
    "rank_images",
]
