"""Images ranked by the F1 of their detections."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from .matching import ground_truth, match_detections


def rank_images(
    records: Sequence[dict],
    predictions: Sequence[dict],
    class_names: Sequence[str],
    *,
    score_thresh: float,
) -> pd.DataFrame:
    """Count right, wrong and missed objects per image at IoU 0.5.

    The other arguments are those of :func:`match_detections`; ``score_thresh`` is inclusive.

    Returns:
        One row per image: ``image_id``, ``tp``, ``fp``, ``fn`` and ``f1`` = 2 tp / (2 tp + fp +
        fn), which is 1 without objects and detections. Sorted by ascending F1, then by descending
        number of errors, then in the order of the records.
    """
    matches = match_detections(records, predictions, class_names)
    matches = matches[matches["score"] >= score_thresh]
    objects = ground_truth(records, class_names)
    ids = [record["image_id"] for record in records]
    tp, fp = (_count(matches[matches["outcome"] == x], ids) for x in ("tp", "fp"))
    fn = _count(objects[~objects["ignored"]], ids) - tp
    total = 2 * tp + fp + fn
    f1 = np.where(total, 2 * tp / np.maximum(total, 1), 1.0)
    table = pd.DataFrame({"image_id": ids, "tp": tp, "fp": fp, "fn": fn, "f1": f1})
    return table.iloc[np.lexsort((-(fp + fn), f1))].reset_index(drop=True)


def _count(rows: pd.DataFrame, ids: Sequence[int | str]) -> np.ndarray:
    return rows["image_id"].value_counts().reindex(ids, fill_value=0).to_numpy(dtype=int)
