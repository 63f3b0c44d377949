"""Precision-recall curve per class, and the score threshold of the best F1."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .matching import ground_truth, match_detections


class PrecisionRecall(NamedTuple):
    """The curve of one class."""

    class_name: str
    num_ground_truth: int  # without ignored objects
    precision: np.ndarray  # (R,) after each detection, by descending score; not made monotonic
    recall: np.ndarray  # (R,) likewise; nan without objects
    score: np.ndarray  # (R,) of each detection
    best_f1: float  # largest harmonic mean of precision and recall; nan without objects
    best_threshold: float  # highest with that F1 (inclusive); nan if no threshold finds an object
    best_precision: float  # at best_threshold; nan without it
    best_recall: float


def precision_recall(
    records: Sequence[dict],
    predictions: Sequence[dict],
    class_names: Sequence[str],
    *,
    iou_thresh: float = 0.5,
) -> list[PrecisionRecall]:
    """Compute the curve of each of the K classes; arguments as in :func:`match_detections`."""
    matches = match_detections(records, predictions, class_names, iou_thresh=iou_thresh)
    matches = matches[matches["outcome"] != "ignored"]
    objects = ground_truth(records, class_names)
    counts = objects.loc[~objects["ignored"], "category_id"].value_counts()
    curves = []
    for k, name in enumerate(class_names):
        rows, count = matches[matches["category_id"] == k], int(counts.get(k, 0))
        right = (rows["outcome"] == "tp").to_numpy()
        curves.append(_curve(name, right, rows["score"].to_numpy(), count))
    return curves


def _curve(name: str, right: np.ndarray, score: np.ndarray, count: int) -> PrecisionRecall:
    found, kept = right.cumsum(), np.arange(1, len(right) + 1)
    precision = found / kept
    recall = found / count if count else np.full(len(right), np.nan)
    best = [0.0 if count else np.nan, np.nan, np.nan, np.nan]
    if count and right.any():
        # A threshold keeps either all detections of equal score or none of them.
        last = np.append(score[1:] != score[:-1], True)
        f1 = np.where(last, 2 * found / (kept + count), 0)
        k = f1.argmax()
        best = [float(values[k]) for values in (f1, score, precision, recall)]
    return PrecisionRecall(name, count, precision, recall, score, *best)
