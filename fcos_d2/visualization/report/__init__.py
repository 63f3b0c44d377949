"""Training curves, detections and an HTML report, drawn from the output folder of a run."""

from .page import write_report

__all__ = ["write_report"]
