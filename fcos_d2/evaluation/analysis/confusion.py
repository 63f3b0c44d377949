"""Which classes are taken for which."""

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

    Detections of a score of at least ``score_thresh`` take objects one to one, the best first,
    whatever their class: a free object of IoU at least ``iou_thresh``, of the detection's own class
    where there is one, else the one of the largest IoU. What is then left takes ignored objects
    (difficult, crowd) of any class, and is not counted.

    Args:
        records, predictions, class_names: see :func:`match_detections`.
        score_thresh: least score of a detection that counts.
        iou_thresh: least IoU of a match.

    Returns:
        (K + 1, K + 1) int: rows are the objects' classes, columns the detections'. The last row
        counts detections on background, the last column objects that are missed.

    Raises:
        ValueError: predictions or records that don't fit together, or an IoU outside (0, 1].
    """
    check_iou(iou_thresh)
    count = len(class_names)
    detections, objects = tabulate(records, predictions, class_names)
    detections = detections[detections["score"] >= score_thresh].reset_index(drop=True)
    ignored, crowd = objects["ignored"].to_numpy(), objects["crowd"].to_numpy()
    truth = np.full(len(detections), count)
    counts = np.ones(len(detections), dtype=bool)
    missed = ~ignored
    real_class = objects["category_id"].to_numpy()
    for pairs in image_pairs(detections, objects):
        # No IoU is above 1: an object of the detection's own class goes before all others.
        enough = pairs.iou >= iou_thresh
        preference = np.where(enough, 1 + pairs.iou + 2 * pairs.same_class, 0)
        taken = match_image(preference, ignored[pairs.objects], crowd[pairs.objects], 1.0)
        found = np.flatnonzero(taken >= 0)
        rows, hit = pairs.detections[found], pairs.objects[taken[found]]
        truth[rows] = real_class[hit]
        counts[rows] = ~ignored[hit]
        missed[hit] = False
    matrix = np.zeros((count + 1, count + 1), dtype=int)
    np.add.at(matrix, (truth[counts], detections["category_id"].to_numpy()[counts]), 1)
    np.add.at(matrix, (real_class[missed], count), 1)
    return matrix
