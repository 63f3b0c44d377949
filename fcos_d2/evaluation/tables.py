"""Tables of an evaluation as data frames, for the log and the report."""

from typing import Any

import pandas as pd

from .coco_evaluation import COCO_ROWS

_CLASS_COLUMNS = {
    "name": "class",
    "AP": "AP",
    "AP50": "AP50",
    "AP50_11point": "VOC 11-point",
    "AP50_area": "VOC area",
    "num_ground_truth": "objects",
    "num_ignored": "ignored",
    "num_predictions": "predictions",
}


def coco_frame(tables: dict[str, Any]) -> pd.DataFrame:
    """COCO's twelve rows, in percent, from the content of ``evaluation.json``."""
    frame = pd.DataFrame(COCO_ROWS, columns=["metric", "IoU", "area", "maxDets"])
    return frame.assign(**{"%": [tables["bbox"][row[0]] for row in COCO_ROWS]})


def voc_frame(tables: dict[str, Any]) -> pd.DataFrame:
    """PASCAL VOC's two means, in percent."""
    names = {"AP50_11point": "VOC AP50, 11-point (2007)", "AP50_area": "VOC AP50, area (2010)"}
    rows = [(name, tables["voc"][key]) for key, name in names.items()]
    return pd.DataFrame(rows, columns=["metric", "%"])


def class_frame(tables: dict[str, Any]) -> pd.DataFrame:
    """One row per class: its metrics in percent, and its numbers of objects and predictions."""
    frame = pd.DataFrame(tables["per_class"])[list(_CLASS_COLUMNS)]
    return frame.rename(columns=_CLASS_COLUMNS)


def to_text(frame: pd.DataFrame) -> str:
    """Format a table for the log."""
    frame = frame.astype(object).where(frame.notna(), None)
    return frame.to_markdown(index=False, floatfmt=".2f", missingval="-")
