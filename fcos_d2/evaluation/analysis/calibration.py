"""Calibration: scores against the share of detections that are right."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from .matching import match_detections


class Calibration(NamedTuple):
    """Detections in bins of their score.

    Attributes:
        table: one row per bin: ``low`` (included) and ``high`` (excluded, except in the last
            bin), ``count``, ``mean_score`` and ``precision`` (nan in an empty bin).
        ece: expected calibration error, the mean of abs(precision - mean_score) over the
            detections (Guo et al., 2017, equation 3); nan without detections.
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
    """Compare the scores of detections with the share of them that is right at IoU 0.5.

    FCOS reports the square root of class probability times centerness, which training does not
    make a probability of being right.

    Args:
        records, predictions, class_names: see :func:`match_detections`.
        bins: number of equally wide bins from 0 to 1.

    Raises:
        ValueError: less than one bin, or a score outside [0, 1].
    """
    if bins < 1:
        raise ValueError(f"bins is {bins}: it must be 1 or more")
    matches = match_detections(records, predictions, class_names)
    matches = matches[matches["outcome"] != "ignored"]
    score = matches["score"].to_numpy()
    if len(score) and not 0 <= score.min() <= score.max() <= 1:
        raise ValueError(f"scores range from {score.min()} to {score.max()}, outside of [0, 1]")
    # Rounded as literals are: a score of 0.3 is in the bin from 3 / 10, but is below 3 * 0.1.
    edges = np.arange(bins + 1) / bins
    bin_of = np.clip(np.searchsorted(edges, score, side="right") - 1, 0, bins - 1)
    right = (matches["outcome"] == "tp").to_numpy(dtype=float)
    count = np.bincount(bin_of, minlength=bins)
    with np.errstate(invalid="ignore"):  # an empty bin has no mean
        mean_score = np.bincount(bin_of, score, minlength=bins) / count
        precision = np.bincount(bin_of, right, minlength=bins) / count
    columns = {"count": count, "mean_score": mean_score, "precision": precision}
    table = pd.DataFrame({"low": edges[:-1], "high": edges[1:], **columns})
    gaps = np.nansum(np.abs(precision - mean_score) * count)
    return Calibration(table, float(gaps / len(score)) if len(score) else float("nan"))
