"""Matching of detections to objects by IoU, as in COCOeval at one threshold."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from pycocotools import mask

from ...data.boxes import box_xywh, size_of_area
from ..records import check_predictions, first_repeated, is_ignored

_MAX_DETECTIONS = 100  # per image and class, as in COCO
_BOX = ["x", "y", "w", "h"]


class ImagePairs(NamedTuple):
    """The detections and objects of one image."""

    detections: np.ndarray  # (D,) rows in the table of detections, by descending score
    objects: np.ndarray  # (G,) rows in the table of objects
    iou: np.ndarray  # (D, G); for a crowd the share of the detection inside it, as in COCO
    same_class: np.ndarray  # (D, G) bool


def ground_truth(records: Sequence[dict], class_names: Sequence[str]) -> pd.DataFrame:
    """Tabulate the objects of a data set.

    Returns:
        One row per object, in the order of the records: ``image_id``, ``index`` in the record's
        annotations, ``category_id``, ``x``, ``y``, ``w``, ``h`` and ``area`` in pixels of the
        original image, ``ignored`` (difficult or crowd), ``crowd``, and ``size``: "small",
        "medium" or "large" by COCO's area bounds of 32^2 and 96^2.

    Raises:
        ValueError: a class id outside [0, K).
    """
    rows = []
    for record in records:
        for index, item in enumerate(record.get("annotations", ())):
            if not 0 <= item["category_id"] < len(class_names):
                raise ValueError(
                    f"object {index + 1} of image {record['image_id']!r} has class id "
                    f"{item['category_id']}, but there are {len(class_names)} classes"
                )
            flags = is_ignored(item), bool(item.get("iscrowd", 0))
            rows.append((record["image_id"], index, item["category_id"], *box_xywh(item), *flags))
    types = {"index": int, "category_id": int, **dict.fromkeys(_BOX, float)}
    types |= {"ignored": bool, "crowd": bool}
    table = pd.DataFrame(rows, columns=["image_id", *types]).astype(types)
    table.insert(7, "area", table["w"] * table["h"])
    table["size"] = size_of_area(table["area"])
    return table


def match_detections(
    records: Sequence[dict],
    predictions: Sequence[dict],
    class_names: Sequence[str],
    *,
    iou_thresh: float = 0.5,
) -> pd.DataFrame:
    """Match detections to objects of their class, by descending score.

    As in ``COCOeval``, a detection matches the free object of its class and image with the largest
    IoU of at least ``iou_thresh``; an ignored object (difficult, crowd) only if no other is
    available; a crowd any number of times. Only the best 100 detections per image and class count.

    The other arguments are those of :func:`fcos_d2.evaluation.coco_table`.

    Returns:
        One row per detection, by descending score, then in the order of the records:
        ``image_id``, ``category_id``, ``score``, ``x``, ``y``, ``w``, ``h``, ``area``, ``image``
        (position of the record), ``truth`` (index of the object in the record's annotations, -1
        for none), ``iou`` with it (0 for none) and ``outcome``: "tp", "fp", or "ignored" for a
        detection that matches an ignored object or does not count.

    Raises:
        ValueError: predictions that do not belong to the records, or an IoU outside (0, 1].
    """
    check_iou(iou_thresh)
    detections, objects = tabulate(records, predictions, class_names)
    truth, iou = np.full(len(detections), -1), np.zeros(len(detections))
    outcome = np.full(len(detections), "fp", dtype=object)
    ignored, crowd = objects["ignored"].to_numpy(), objects["crowd"].to_numpy()
    index = objects["index"].to_numpy()
    for pairs in image_pairs(detections, objects):
        own_iou = np.where(pairs.same_class, pairs.iou, 0)
        taken = match_image(own_iou, ignored[pairs.objects], crowd[pairs.objects], iou_thresh)
        found = np.flatnonzero(taken >= 0)
        rows, columns = pairs.detections[found], taken[found]
        truth[rows] = index[pairs.objects[columns]]
        iou[rows] = pairs.iou[found, columns]
        outcome[rows] = np.where(ignored[pairs.objects[columns]], "ignored", "tp")
    beyond = detections.groupby(["image_id", "category_id"]).cumcount() >= _MAX_DETECTIONS
    outcome[beyond.to_numpy(dtype=bool)] = "ignored"
    return detections.assign(truth=truth, iou=iou, outcome=outcome)


def check_iou(iou_thresh: float) -> None:
    if not 0 < iou_thresh <= 1:
        raise ValueError(f"iou_thresh is {iou_thresh}: it must be above 0 and at most 1")


def tabulate(
    records: Sequence[dict], predictions: Sequence[dict], class_names: Sequence[str]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the tables of :func:`match_detections` (without matches) and :func:`ground_truth`.

    Both have a column ``image``, the position of the record.

    Raises:
        ValueError: predictions that do not belong to the records, or a repeated image id.
    """
    position = {record["image_id"]: i for i, record in enumerate(records)}
    repeated = first_repeated(record["image_id"] for record in records)
    if repeated is not None:
        raise ValueError(f"two of the records have the image id {repeated!r}")
    check_predictions(predictions, position, class_names)
    rows = [(x["image_id"], x["category_id"], x["score"], *x["bbox"]) for x in predictions]
    types = {"category_id": int, **dict.fromkeys(("score", *_BOX), float)}
    detections = pd.DataFrame(rows, columns=["image_id", *types]).astype(types)
    detections["area"] = detections["w"] * detections["h"]
    objects = ground_truth(records, class_names)
    for table in (detections, objects):
        table["image"] = table["image_id"].map(position).astype(int)
    order = np.lexsort((detections["image"], -detections["score"]))
    return detections.iloc[order].reset_index(drop=True), objects


def image_pairs(detections: pd.DataFrame, objects: pd.DataFrame) -> Iterator[ImagePairs]:
    """Yield the images with both detections and objects, from the tables of :func:`tabulate`."""
    rows_of_objects = objects.groupby("image").indices
    found, real = detections[_BOX].to_numpy(), objects[_BOX].to_numpy()
    found_class = detections["category_id"].to_numpy()
    real_class, crowd = objects["category_id"].to_numpy(), objects["crowd"].to_numpy()
    for image, rows in detections.groupby("image").indices.items():
        if image in rows_of_objects:
            columns = rows_of_objects[image]
            iou = mask.iou(found[rows], real[columns], crowd[columns].astype(np.uint8))
            same_class = found_class[rows][:, None] == real_class[columns]
            yield ImagePairs(rows, columns, iou, same_class)


def match_image(
    iou: np.ndarray, ignored: np.ndarray, crowd: np.ndarray, iou_thresh: float
) -> np.ndarray:
    """Match the detections of one image, by descending score, to its objects.

    Args:
        iou: (D, G); 0 where a detection may not match an object.
        ignored: (G,) bool, objects that are matched only if no other is available.
        crowd: (G,) bool, objects that any number of detections can match.
        iou_thresh: minimum IoU.

    Returns:
        (D,) object of each detection, -1 for none; the last one of equal IoU, as in ``COCOeval``.
    """
    taken = np.full(len(iou), -1)
    free = np.ones(iou.shape[1], dtype=bool)
    enough = iou >= min(iou_thresh, 1 - 1e-10)
    for row in np.flatnonzero(enough.any(1)):
        can = enough[row] & (free | crowd)
        group = can & ~ignored if (can & ~ignored).any() else can
        candidates = np.flatnonzero(group)[::-1]
        if len(candidates):
            best = candidates[iou[row, candidates].argmax()]
            taken[row], free[best] = best, False
    return taken
