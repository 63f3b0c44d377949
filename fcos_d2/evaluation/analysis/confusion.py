"""Confusion matrix of classes and background."""

from collections.abc import Sequence

import numpy as np

from .matching import check_iou, image_pairs, match_image, tabulate


def confusion_matrix(
    records: Sequence[dict],
    predictions: Sequence[dict],
    class_names: Sequence[str],
    *,
    score_thresh: float,
    iou_thresh: float = 0.5,
) -> np.ndarray:
    """Count objects by their class and the class that they are detected as.

    Detections are matched to objects one to one, regardless of class and by descending score: to
    the free object of the largest IoU, but objects of the detection's own class come first.
    Detections without such an object may match an ignored one (difficult, crowd) of any class, and
    are then not counted.

    The other arguments are those of :func:`match_detections`; ``score_thresh`` is inclusive.

    Returns:
        (K + 1, K + 1) int: rows are the classes of objects, columns those of detections. The last
        row counts detections on background, the last column missed objects.

    Raises:
        ValueError: predictions that do not belong to the records, or an IoU outside (0, 1].
    """
    check_iou(iou_thresh)
    count = len(class_names)
    detections, objects = tabulate(records, predictions, class_names)
    detections = detections[detections["score"] >= score_thresh].reset_index(drop=True)
    ignored, crowd = objects["ignored"].to_numpy(), objects["crowd"].to_numpy()
    real_class, found_class = (x["category_id"].to_numpy() for x in (objects, detections))
    truth = np.full(len(detections), count)
    counts = np.ones(len(detections), dtype=bool)
    missed = ~ignored
    for pairs in image_pairs(detections, objects):
        # IoU is at most 1, so objects of the detection's own class come before all others.
        enough = pairs.iou >= iou_thresh
        preference = np.where(enough, 1 + pairs.iou + 2 * pairs.same_class, 0)
        taken = match_image(preference, ignored[pairs.objects], crowd[pairs.objects], 1.0)
        found = np.flatnonzero(taken >= 0)
        rows, hit = pairs.detections[found], pairs.objects[taken[found]]
        truth[rows] = real_class[hit]
        counts[rows] = ~ignored[hit]
        missed[hit] = False
    matrix = np.zeros((count + 1, count + 1), dtype=int)
    np.add.at(matrix, (truth[counts], found_class[counts]), 1)
    np.add.at(matrix, (real_class[missed], count), 1)
    return matrix
