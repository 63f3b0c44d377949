"""What lies behind an AP: curves, confusions, kinds of errors, calibration, single images."""

from .calibration import Calibration, calibration
from .confusion import confusion_matrix
from .errors import ERROR_TYPES, ErrorBreakdown, error_breakdown
from .matching import ground_truth, match_detections
from .precision_recall import PrecisionRecall, precision_recall
from .ranking import rank_images

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
