"""Predictions and ignored objects, as all tables of the evaluation read them."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from detectron2.structures import BoxMode, Instances


def is_ignored(annotation: dict) -> bool:
    """Whether detecting an object is neither right nor wrong: VOC's difficult, COCO's crowd."""
    return bool(annotation.get("difficult", 0) or annotation.get("iscrowd", 0))


def first_repeated(image_ids: Iterable[int | str]) -> int | str | None:
    """Return the first image id that occurs more than once, or None."""
    return next((image_id for image_id, n in Counter(image_ids).items() if n > 1), None)


def predictions_of(instances: Instances, image_id: int | str) -> list[dict]:
    """Convert the detections of one image to COCO's result format, with contiguous class ids.

    Args:
        instances: ``pred_boxes`` (N, 4) XYXY in pixels of the original image, ``scores`` (N,) and
            ``pred_classes`` (N,).
        image_id: of the record.

    Returns:
        N dicts with ``image_id``, ``category_id`` in [0, K), ``bbox`` XYWH and ``score``; floats
        are not rounded.
    """
    instances = instances.to("cpu")
    boxes = instances.pred_boxes.tensor.double()
    boxes = BoxMode.convert(boxes, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS).tolist()
    scores, classes = instances.scores.tolist(), instances.pred_classes.tolist()
    return [
        {"image_id": image_id, "category_id": category, "bbox": box, "score": score}
        for box, score, category in zip(boxes, scores, classes, strict=True)
    ]


def check_predictions(
    predictions: Iterable[dict], image_ids: Iterable[int | str], class_names: Sequence[str]
) -> None:
    """Refuse predictions, as from :func:`predictions_of`, that do not belong to a data set.

    Raises:
        ValueError: an unknown image id, a class id outside [0, K), or a box or score that is not
            finite.
    """
    known, count = set(image_ids), len(class_names)
    for prediction in predictions:
        image_id, category = prediction["image_id"], prediction["category_id"]
        if image_id not in known:
            raise ValueError(
                f"a prediction is for image {image_id!r}, which is not among the {len(known)} "
                "images of the data set: evaluate on the records that the model was run on"
            )
        if not 0 <= category < count:
            raise ValueError(
                f"a prediction on image {image_id!r} has class id {category}, but the data set "
                f"has {count} classes (ids 0 to {count - 1}): set MODEL.FCOS.NUM_CLASSES to {count}"
            )
        if not all(map(math.isfinite, (*prediction["bbox"], prediction["score"]))):
            raise ValueError(
                f"a prediction on image {image_id!r} is not finite: box {prediction['bbox']}, "
                f"score {prediction['score']}; the weights have probably diverged"
            )
