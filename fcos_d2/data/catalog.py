"""Reader of records that a function registered in Detectron2's ``DatasetCatalog`` returns."""

import os

from detectron2.data import DatasetCatalog, MetadataCatalog

from .boxes import box_problem, box_xyxy
from .findings import DataError, ObjectError, Origin, Source

# Not trained on, and all records stay in memory.
_UNUSED = ("segmentation", "keypoints")


def read_catalog(source: Source) -> None:
    """Read the records registered under the name of ``source``, and check them.

    A record without ``image_id`` gets its position.

    Raises:
        DataError: no class names are known.
    """
    loaded = DatasetCatalog.get(source.name)
    # Detectron2's loaders of json files set the names when they read the file.
    source.class_names = list(MetadataCatalog.get(source.name).get("thing_classes") or ())
    if not source.class_names:
        raise DataError(
            f"{source.name} has no class names: set MetadataCatalog.get(name).thing_classes."
        )
    ids = set()
    for number, record in enumerate(loaded):
        missing = [key for key in ("file_name", "height", "width") if key not in record]
        if missing:
            source.error("bad object", source.name, f"record {number} has no {missing[0]!r}")
            continue
        path = record["file_name"]
        if not os.path.isfile(path):
            source.error("bad image", path, "the image is missing")
            continue
        kept, indices = [], []
        for index, annotation in enumerate(record.get("annotations", [])):
            ids.add(annotation.get("category_id"))
            try:
                _check_annotation(annotation, record, source.class_names)
            except ObjectError as error:
                source.error(error.kind, path, f"object {index + 1}{error}")
                continue
            kept.append({k: v for k, v in annotation.items() if k not in _UNUSED})
            indices.append(index)
        size = {key: int(record[key]) for key in ("height", "width")}
        source.records.append({"image_id": number, **record, **size, "annotations": kept})
        source.origins.append(Origin(path, None, "", indices))
    if 0 not in ids and len(source.class_names) in ids:
        source.error(
            "bad object",
            source.name,
            f"no object has the category id 0, but some have {len(source.class_names)}: the ids "
            "count from 1. Subtract 1 in the function that makes the records.",
        )


def _check_annotation(annotation: dict, record: dict, class_names: list[str]) -> None:
    """Check class and box of an object in Detectron2's format; raise ObjectError."""
    for key in ("bbox", "bbox_mode", "category_id"):
        if key not in annotation:
            raise ObjectError("bad object", f" has no {key!r}: it is not in Detectron2's format")
    category, count = annotation["category_id"], len(class_names)
    if category not in range(count):
        message = f": category id {category}, but the {count} classes have the ids 0 to {count - 1}"
        raise ObjectError("bad object", message)
    try:
        box = box_xyxy(annotation)
        reason = box_problem(box, record["width"], record["height"])
    except (AssertionError, NotImplementedError, TypeError, ValueError) as error:
        message = f": bbox {annotation['bbox']!r} is not in its bbox_mode ({error})"
        raise ObjectError("bad object", message) from error
    if reason:
        raise ObjectError("bad box", f" ({class_names[category]}): box {box} {reason}")
