"""The evaluation's tables as text for the log."""

import math
from collections.abc import Sequence

from tabulate import tabulate

from .coco import COCO_ROWS


def format_coco_table(table: dict[str, float]) -> str:
    """COCO's twelve rows: metric, IoU, area, detections an image, percent."""
    rows = [[*row, _shown(table[row[0]])] for row in COCO_ROWS]
    return _table(rows, ["metric", "IoU", "area", "maxDets", "%"])


def format_voc_table(table: dict[str, float]) -> str:
    """PASCAL VOC's two means, in percent."""
    rows = [
        ["VOC AP50, 11-point (2007)", _shown(table["AP50_11point"])],
        ["VOC AP50, area (2010)", _shown(table["AP50_area"])],
    ]
    return _table(rows, ["metric", "%"])


def format_class_table(rows: Sequence[dict]) -> str:
    """One row a class: its numbers in percent, its objects and its predictions."""
    keys = ("AP", "AP50", "AP50_11point", "AP50_area")
    counts = ("num_ground_truth", "num_ignored", "num_predictions")
    body = [
        [row["name"], *(_shown(row[key]) for key in keys), *(row[key] for key in counts)]
        for row in rows
    ]
    headers = ["class", "AP", "AP50", "VOC 11-point", "VOC area"]
    return _table(body, [*headers, "objects", "ignored", "predictions"])


def _table(rows: Sequence[Sequence], headers: Sequence[str]) -> str:
    return tabulate(rows, headers=headers, floatfmt=".2f", missingval="-", tablefmt="pipe")


def _shown(value: float) -> float | None:
    return None if math.isnan(value) else value
