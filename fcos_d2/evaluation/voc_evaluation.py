"""PASCAL VOC's average precision at IoU 0.5: 11-point (2007) and area under the curve (2010)."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from pycocotools import mask as coco_mask

from ..data.boxes import box_xywh
from .average_precision import area_ap, eleven_point_ap, precision_recall
from .records import check_predictions, is_ignored

IOU_THRESHOLD = 0.5

_Objects = dict[int | str, list[tuple[list[float], bool]]]  # {image: [(box XYWH, ignored)]}


def voc_average_precision(
    records: Sequence[dict], predictions: Sequence[dict], class_names: Sequence[str]
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Average precision per class and its mean, in percent, by the rules of the VOC devkit.

    Detections of a class are visited by descending score. Each is assigned to the object of its
    class and image with the largest IoU. At an IoU of 0.5 or more it is right if it is the first
    of that object, wrong if not, and neither if the object is ignored (``difficult``, ``iscrowd``);
    below 0.5 it is wrong. (Detectron2's port requires more than 0.5, the devkit at least 0.5.)

    Boxes are continuous, so plain IoU equals the devkit's, whose boxes include their last pixel.

    Args:
        records, predictions, class_names: see :func:`coco_table`; all images count.

    Returns:
        ``AP50_11point`` and ``AP50_area``, each the mean over the classes with an object that is
        not ignored, and a list of K dicts with the same keys (nan for the other classes).

    Raises:
        ValueError: a prediction for an unknown image or class.
    """
    check_predictions(predictions, [record["image_id"] for record in records], class_names)
    objects: list[_Objects] = [defaultdict(list) for _ in class_names]
    for record in records:
        for item in record.get("annotations", ()):
            row = (box_xywh(item), is_ignored(item))
            objects[item["category_id"]][record["image_id"]].append(row)
    detections: list[list[dict]] = [[] for _ in class_names]
    for prediction in sorted(predictions, key=lambda x: -x["score"]):  # equal scores keep order
        detections[prediction["category_id"]].append(prediction)
    classes = [_class_ap(*pair) for pair in zip(detections, objects, strict=True)]
    means = {}
    for key in ("AP50_11point", "AP50_area"):
        values = [row[key] for row in classes if not np.isnan(row[key])]
        means[key] = float(np.mean(values)) if values else np.nan
    return means, classes


def _class_ap(detections: Sequence[dict], objects: _Objects) -> dict[str, float]:
    positives = sum(not ignored for rows in objects.values() for _, ignored in rows)
    if not positives:
        return {"AP50_11point": np.nan, "AP50_area": np.nan}
    curve = precision_recall(*_match(detections, objects), positives)
    return {"AP50_11point": 100 * eleven_point_ap(*curve), "AP50_area": 100 * area_ap(*curve)}


def _match(detections: Sequence[dict], objects: _Objects) -> tuple[np.ndarray, np.ndarray]:
    """Find the right and wrong detections of one class, by descending score.

    A detection is assigned to its best object even if that one is taken, so matching needs no
    loop: of the detections assigned to an object, the first is right and the others are wrong.

    Returns:
        right (D,) and wrong (D,), bool; both are False where the object is ignored.
    """
    rows_of_image = defaultdict(list)
    for row, detection in enumerate(detections):
        rows_of_image[detection["image_id"]].append(row)
    best = np.full(len(detections), -1)  # number of the assigned object, over all images
    ignored = np.zeros(len(detections), dtype=bool)
    first = 0
    for image_id, items in objects.items():
        boxes, flags = (np.array(column) for column in zip(*items, strict=True))
        if rows := rows_of_image.get(image_id):
            detected = np.array([detections[row]["bbox"] for row in rows], dtype=float)
            overlaps = coco_mask.iou(detected, boxes, np.zeros(len(boxes), dtype=np.uint8))
            nearest = overlaps.argmax(axis=1)
            close = overlaps.max(axis=1) >= IOU_THRESHOLD
            best[rows] = np.where(close, first + nearest, -1)
            ignored[rows] = close & flags[nearest]
        first += len(boxes)
    right = np.zeros(len(detections), dtype=bool)
    right[np.unique(best, return_index=True)[1]] = True
    right &= (best >= 0) & ~ignored
    return right, ~right & ~ignored
