"""Photographs of the report: predictions beside ground truth, and locations of objects."""

import logging
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from detectron2.config import CfgNode

from ...data.inspection.assignment import Assignment
from ..detections import draw_ground_truth, draw_predictions, group_predictions, read_scaled
from ..overlays import draw_assignment
from .figures import PHOTO_SIDE, Picture, jpeg
from .gather import Evaluation

logger = logging.getLogger(__name__)

_MAX_SCALE = 3  # maximum upscale for tiny images
_OVERLAY_SIDE = 800  # pixels; locations are dots of a few pixels


class Photo(NamedTuple):
    """Drawings of one image, all of one size."""

    name: str
    caption: str
    pictures: list[Picture]


def choose_images(ranking: pd.DataFrame, count: int = 4) -> dict[str, list[int | str]]:
    """Choose the best, typical and worst images, without repetition.

    Among images of equal F1, the best are those with the most objects found. Typical images are
    around the median. Of fewer than three times ``count`` images, each group gets a third.

    Args:
        ranking: one row per image, worst first, as from ``rank_images``.
        count: number of images per group.

    Returns:
        Image ids per group.
    """
    count = min(count, -(-len(ranking) // 3))
    order = ranking.sort_values(["f1", "tp"], ascending=False, kind="stable")
    best = order["image_id"].tolist()[:count]
    rest = ranking.loc[~ranking["image_id"].isin(best), "image_id"].tolist()
    worst, middle = rest[:count], rest[count:]
    # The median of all images, as close as the remaining ones allow.
    start = max(min(len(ranking) // 2 - count - count // 2, len(middle) - count), 0)
    return {"Best": best, "Typical": middle[start : start + count], "Worst": worst}


def draw_pairs(
    image_ids: Sequence[int | str],
    evaluation: Evaluation,
    ranking: pd.DataFrame,
    *,
    score_thresh: float,
) -> list[Photo]:
    """Draw ground truth and predictions of some images, without the unreadable ones.

    Args:
        image_ids: ids of the records to draw.
        evaluation: has records and predictions.
        ranking: ``image_id``, ``tp``, ``fp`` and ``fn`` per image.
        score_thresh: predictions with a lower score are not drawn.
    """
    records = {record["image_id"]: record for record in evaluation.records or ()}
    counts = ranking.set_index("image_id")
    found = group_predictions(evaluation.predictions or (), score_thresh)
    names = evaluation.class_names
    photos = []
    for image_id in image_ids:
        record = records[image_id]
        try:
            image = read_scaled(record, PHOTO_SIDE, PHOTO_SIDE, _MAX_SCALE)
        except OSError as error:
            logger.warning("not drawn: %s (%s)", record["file_name"], error)
            continue
        tp, fp, fn = (int(counts.loc[image_id, key]) for key in ("tp", "fp", "fn"))
        caption = f"{tp} right, {fp} wrong, {fn} missed"
        objects = ", ".join(names[x["category_id"]] for x in record.get("annotations", ()))
        truth = draw_ground_truth(image, record, names)
        predicted = draw_predictions(image, record, found[image_id], names)
        pictures = [
            jpeg(truth, f"{image_id}, ground truth: {objects or 'no objects'}"),
            jpeg(predicted, f"{image_id}, predictions: {caption}"),
        ]
        photos.append(Photo(str(image_id), caption, pictures))
    return photos


def draw_locations(
    records: Sequence[dict],
    assignment: Assignment,
    class_names: Sequence[str],
    cfg: CfgNode,
    *,
    count: int,
) -> list[Photo]:
    """Draw the positive locations of some images with objects, without the unreadable ones."""
    objects = assignment.objects
    uncovered = Counter(objects.loc[objects["positives"] == 0, "image_id"])
    trained = Counter(objects["image_id"])
    photos = []
    for record in choose_records([x for x in records if trained[x["image_id"]]], count):
        image_id = record["image_id"]
        try:
            image = draw_assignment(record, cfg, class_names=class_names)
        except (OSError, ValueError) as error:
            message = " ".join(str(error).split())
            logger.warning("not drawn: %s (%s)", record["file_name"], message)
            continue
        caption = f"{uncovered[image_id]} of {trained[image_id]} objects without a location"
        picture = jpeg(image, f"{image_id}, positive locations: {caption}", _OVERLAY_SIDE)
        photos.append(Photo(str(image_id), caption, [picture]))
    return photos


def choose_records(records: Sequence[dict], count: int) -> list[dict]:
    """Return a random but reproducible choice of records, in their order."""
    chosen = np.random.default_rng(0).permutation(len(records))[:count]
    return [records[i] for i in sorted(chosen)]
