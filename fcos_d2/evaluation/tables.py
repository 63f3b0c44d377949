"""The evaluation's tables as text for the log."""

import math
from collections.abc import Sequence

from tabulate import tabulate

from .coco_evaluation import COCO_ROWS

# Columns of the table of classes: keys of ``per_class`` in evaluation.json, and their titles.
CLASS_COLUMNS = {
    "name": "class",
    "AP": "AP",
    "AP50": "AP50",
    "AP50_11point": "VOC 11-point",
    "AP50_area": "VOC area",
    "num_ground_truth": "objects",
    "num_ignored": "ignored",
    "num_predictions": "predictions",
}


def format_coco_table(table: dict[str, float]) -> str:
    """COCO's twelve rows: metric, IoU, area, detections per image, percent."""
    rows = [[*row, table[row[0]]] for row in COCO_ROWS]
    return _format(rows, ["metric", "IoU", "area", "maxDets", "%"])


def format_voc_table(table: dict[str, float]) -> str:
    """PASCAL VOC's two means, in percent."""
    rows = [
        ["VOC AP50, 11-point (2007)", table["AP50_11point"]],
        ["VOC AP50, area (2010)", table["AP50_area"]],
    ]
    return _format(rows, ["metric", "%"])


def format_class_table(rows: Sequence[dict]) -> str:
    """One row per class: its metrics in percent, and its numbers of objects and predictions."""
    return _format([[row[key] for key in CLASS_COLUMNS] for row in rows], [*CLASS_COLUMNS.values()])


def _format(rows: Sequence[Sequence], headers: Sequence[str]) -> str:
    shown = [
        [None if isinstance(x, float) and math.isnan(x) else x for x in cells] for cells in rows
    ]
    return tabulate(shown, headers=headers, floatfmt=".2f", missingval="-", tablefmt="pipe")
