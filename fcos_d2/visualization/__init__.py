"""Pictures of a run: training curves, and detections beside the ground truth."""

from .curves import plot_training_curves
from .detections import draw_detection_grid
from .run import plot_run

__all__ = ["draw_detection_grid", "plot_run", "plot_training_curves"]
