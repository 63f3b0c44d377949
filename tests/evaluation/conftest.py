"""Builders of records and predictions."""

from detectron2.structures import BoxMode


def record(image_id, *objects, mode=BoxMode.XYXY_ABS):
    """A record of objects (class, 4 numbers of the box) or (class, 4 numbers, flags)."""
    annotations = [
        {"bbox": [a, b, c, d], "bbox_mode": mode, "category_id": k, **(flags[0] if flags else {})}
        for k, a, b, c, d, *flags in objects
    ]
    image = {"image_id": image_id, "file_name": f"{image_id}.jpg", "height": 200, "width": 200}
    return {**image, "annotations": annotations}


def make_record(image_id, *objects):
    """A record of objects (class, XYWH box) or (class, XYWH box, flags)."""
    flat = ((category, *box, *flags) for category, box, *flags in objects)
    return record(image_id, *flat, mode=BoxMode.XYWH_ABS)


def predict(image_id, category, box, score):
    """A prediction, from its XYWH box."""
    return {"image_id": image_id, "category_id": category, "bbox": box, "score": score}


def found(image_id, category, x0, y0, x1, y1, score):
    """A prediction, from its corners."""
    return predict(image_id, category, [x0, y0, x1 - x0, y1 - y0], score)
