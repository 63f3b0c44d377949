"""Pictures of a run: training curves, and detections beside the ground truth."""

from .curves import plot_training_curves
from .detections import draw_detection_grid

__all__ = ["draw_detection_grid", "plot_training_curves"]
