"""Average precision of one class from its detections, by the rules of COCO and PASCAL VOC."""

import numpy as np

_COCO_RECALLS = np.linspace(0, 1, 101)
# Rounded as hits / positives is: a recall of exactly 0.3 reaches its point, unlike 3 * 0.1.
_VOC_RECALLS = np.arange(11) / 10


def precision_recall(
    right: np.ndarray, wrong: np.ndarray, positives: int
) -> tuple[np.ndarray, np.ndarray]:
    """Compute recall and precision after each detection.

    Args:
        right: (D,) bool, by descending score.
        wrong: (D,) bool; a detection may be neither.
        positives: number of objects.

    Returns:
        Two arrays (D,).
    """
    hits, misses = np.cumsum(right), np.cumsum(wrong)
    return hits / max(positives, 1), hits / np.maximum(hits + misses, 1)


def precision_at(recall: np.ndarray, precision: np.ndarray, recalls: np.ndarray) -> np.ndarray:
    """Return the highest precision at each of ``recalls`` or more; 0 beyond the last recall.

    Args:
        recall, precision: (D,), as from :func:`precision_recall`.
        recalls: (R,).
    """
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return np.append(envelope, 0.0)[np.searchsorted(recall, recalls)]


def coco_ap(recall: np.ndarray, precision: np.ndarray) -> float:
    """COCO's AP: mean precision at 101 recalls."""
    return float(precision_at(recall, precision, _COCO_RECALLS).mean())


def eleven_point_ap(recall: np.ndarray, precision: np.ndarray) -> float:
    """VOC2007's AP: mean precision at the recalls 0, 0.1 ... 1."""
    return float(precision_at(recall, precision, _VOC_RECALLS).mean())


def area_ap(recall: np.ndarray, precision: np.ndarray) -> float:
    """VOC2010's AP: area under the monotonically decreasing envelope of precision over recall."""
    envelope = precision_at(recall, precision, recall)
    return float(np.sum(np.diff(recall, prepend=0.0) * envelope))
