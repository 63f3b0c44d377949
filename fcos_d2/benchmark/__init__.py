"""fcos_d2 against other FCOS implementations: the same work, the same weights, side by side."""

from .agreement import DisagreementError
from .growth import plot_growth
from .run import PARTS, PEERS, PRECISIONS, Options, run_benchmark
from .tables import format_report

__all__ = [
    "DisagreementError",
    "Options",
    "PARTS",
    "PEERS",
    "PRECISIONS",
    "format_report",
    "plot_growth",
    "run_benchmark",
]
