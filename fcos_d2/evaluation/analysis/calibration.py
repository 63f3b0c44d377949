"""How far the score is the probability of being right."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from .matching import match_detections


class Calibration(NamedTuple):
    """Detections in bins of their score.

    Attributes:
        table: a row a bin: ``low`` and ``high`` (it holds scores from low up to, but for the last
            bin, high), ``count``, ``mean_score`` and ``precision`` (nan in an empty bin).
        ece: expected calibration error, the mean of abs(precision - mean_score) over the
            detections (Guo et al., 2017, equation 3); nan without any.
    """

    table: pd.DataFrame
    ece: float


def calibration(
    records: Sequence[dict],
    predictions: Sequence[dict],
    class_names: Sequence[str],
    *,
    bins: int = 10,
) -> Calibration:
    """Compare the score of detections with the share of them that is right at IoU 0.5.

    Nothing in a detector's training makes its score a probability: FCOS reports the root of the
    class probability times the centerness. The comparison tells what a threshold means.

    Args:
        records, predictions, class_names: see :func:`match_detections`.
        bins: number of bins of equal width from 0 to 1.

    Raises:
        ValueError: no bin, or a score outside [0, 1].
    """
    if bins < 1:
        raise ValueError(f"bins is {bins}: it has to be 1 or more")
    matches = match_detections(records, predictions, class_names)
    matches = matches[matches["outcome"] != "ignored"]
    score = matches["score"].to_numpy()
    if len(score) and not 0 <= score.min() <= score.max() <= 1:
        raise ValueError(f"scores go from {score.min()} to {score.max()}, not from 0 to 1")
    # k / bins is the nearest number to each edge: a score of 0.3 is not below 3 * 0.1.
    edges = np.arange(bins + 1) / bins
    place = np.clip(np.searchsorted(edges, score, side="right") - 1, 0, bins - 1)
    right = (matches["outcome"] == "tp").to_numpy(dtype=float)
    count = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):  # an empty bin has no mean
        mean_score = np.bincount(place, score, minlength=bins) / count
        precision = np.bincount(place, right, minlength=bins) / count
    table = pd.DataFrame(
        {
            "low": edges[:-1],
            "high": edges[1:],
            "count": count,
            "mean_score": mean_score,
            "precision": precision,
        }
    )
    gaps = np.nansum(np.abs(precision - mean_score) * count)
    return Calibration(table, float(gaps / len(score)) if len(score) else float("nan"))
