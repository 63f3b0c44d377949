"""PASCAL VOC's own average precision at IoU 0.5: the 11-point one of 2007 and the area of 2010."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from pycocotools import mask as coco_mask

from ..data.boxes import box_xywh
from .records import check_predictions, is_ignored

IOU_THRESHOLD = 0.5


def voc_average_precision(
    records: Sequence[dict], predictions: Sequence[dict], class_names: Sequence[str]
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Average precision of each class and its mean, in percent, by the VOC devkit's rules.

    Detections of a class are taken by falling score. Each goes to the object of its class and
    image that it overlaps most. At an IoU of 0.5 or more it is right if the object was not found
    before, wrong if it was, and neither if the object is ignored (``difficult``, ``iscrowd``);
    below 0.5 it is wrong. (Detectron2's port asks for more than 0.5, the devkit for at least.)

    Boxes are continuous, so plain IoU equals the devkit's, whose boxes include their last pixel.

    Args:
        records: Detectron2 dataset dicts; all of their images count.
        predictions: dicts with ``image_id`` as in the records, ``category_id`` in [0, K), ``bbox``
            XYWH in pixels of the original image and ``score``.
        class_names: names of the K classes.

    Returns:
        ``AP50_11point`` and ``AP50_area``, each the mean over the classes that have an object
        which is not ignored, and a list of K dicts with the same keys (nan for the other classes).

    Raises:
        ValueError: a prediction for an unknown image or class.
    """
    check_predictions(predictions, [record["image_id"] for record in records], class_names)
    truth = _truth_by_class(records, len(class_names))
    found = _predictions_by_class(predictions, len(class_names))
    classes = []
    for objects, detections in zip(truth, found, strict=True):
        positives = sum(int(np.sum(~ignored)) for _, ignored in objects.values())
        right, wrong = _judge(detections, objects)
        recall, precision = precision_recall(right, wrong, positives)
        measured = positives > 0
        classes.append(
            {
                "AP50_11point": 100 * eleven_point_ap(recall, precision) if measured else np.nan,
                "AP50_area": 100 * area_ap(recall, precision) if measured else np.nan,
            }
        )
    means = {}
    for key in ("AP50_11point", "AP50_area"):
        values = [row[key] for row in classes if not np.isnan(row[key])]
        means[key] = float(np.mean(values)) if values else float("nan")
    return means, classes


def precision_recall(
    right: np.ndarray, wrong: np.ndarray, positives: int
) -> tuple[np.ndarray, np.ndarray]:
    """Recall and precision after each detection.

    Args:
        right: (D,) bool, by falling score.
        wrong: (D,) bool; a detection may be neither.
        positives: number of objects to find.

    Returns:
        Two arrays (D,).
    """
    hits, misses = np.cumsum(right), np.cumsum(wrong)
    return hits / max(positives, 1), hits / np.maximum(hits + misses, 1)


def eleven_point_ap(recall: np.ndarray, precision: np.ndarray) -> float:
    """VOC2007's AP: mean over recall 0, 0.1 ... 1 of the best precision at that recall or more.

    Args:
        recall: (D,) ascending.
        precision: (D,).
    """
    # k / 10 is the nearest number to each point, as hits / positives is: a recall of exactly 0.3
    # counts, which it does not against 3 * 0.1.
    reached = recall[None, :] >= (np.arange(11) / 10)[:, None]  # (11, D)
    return float(np.where(reached, precision[None, :], 0.0).max(axis=1, initial=0.0).mean())


def area_ap(recall: np.ndarray, precision: np.ndarray) -> float:
    """VOC2010's AP: the area under precision made to fall monotonically, over recall.

    Args:
        recall: (D,) ascending.
        precision: (D,).
    """
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall, prepend=0.0) * envelope))


def _truth_by_class(
    records: Sequence[dict], num_classes: int
) -> list[dict[int | str, tuple[np.ndarray, np.ndarray]]]:
    """For each class {image id: (boxes (G, 4) XYWH, ignored (G,) bool)}."""
    grouped = [defaultdict(list) for _ in range(num_classes)]
    for record in records:
        for item in record.get("annotations", ()):
            row = (box_xywh(item), is_ignored(item))
            grouped[item["category_id"]][record["image_id"]].append(row)
    return [
        {
            image_id: (np.array([box for box, _ in rows]), np.array([flag for _, flag in rows]))
            for image_id, rows in images.items()
        }
        for images in grouped
    ]


def _predictions_by_class(predictions: Sequence[dict], num_classes: int) -> list[list[dict]]:
    """For each class its predictions by falling score; equal scores keep their order."""
    grouped = [[] for _ in range(num_classes)]
    for prediction in predictions:
        grouped[prediction["category_id"]].append(prediction)
    return [sorted(rows, key=lambda row: -row["score"]) for rows in grouped]


def _judge(
    detections: Sequence[dict], objects: dict[int | str, tuple[np.ndarray, np.ndarray]]
) -> tuple[np.ndarray, np.ndarray]:
    """Which of one class's detections, by falling score, are right and which are wrong.

    A detection goes to its best object whether or not that one is taken, so the matching needs no
    loop: of the detections that go to an object, the first is right and the others are wrong.

    Returns:
        right (D,) and wrong (D,), bool; neither is set where the object is ignored.
    """
    rows_of_image = defaultdict(list)
    for row, detection in enumerate(detections):
        rows_of_image[detection["image_id"]].append(row)
    best = np.full(len(detections), -1)  # number of the object it goes to, over all images
    ignored = np.zeros(len(detections), dtype=bool)
    first = 0
    for image_id, (boxes, flags) in objects.items():
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
