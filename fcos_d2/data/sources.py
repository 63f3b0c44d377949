"""Data sources by name: ``voc:PATH:SPLIT``, ``coco:JSON:IMAGES``, ``shapes:SPLIT:COUNT``."""

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.structures import BoxMode

from .checks import DataError, Problems, box_problem
from .shapes import make_shapes
from .voc import find_class_names, read_voc

_FORMS = (
    "'voc:PATH:SPLIT' or 'voc:PATH' (a VOC folder), 'coco:ANNOTATIONS.json:IMAGE_FOLDER', "
    "'shapes:SPLIT:COUNT' (generated), or a name that Detectron2 knows"
)
# Records of the sources that were read already, by name.
_RECORDS: dict[str, list[dict]] = {}
_SKIP_BAD_BOXES: dict[str, bool] = {}


def register_source(name: str, skip_bad_boxes: bool = False) -> Metadata:
    """Make a data source known to Detectron2 under exactly this name.

    A name that is known already is left as it is.

    Args:
        name: one of the forms above.
        skip_bad_boxes: what :func:`load_records` does with boxes that are empty, inverted or
            outside their image: leave them out with a logged count instead of an error.

    Returns:
        Its metadata, with ``thing_classes``.

    Raises:
        DataError: the name has none of the forms, or the source can't be read.
    """
    _SKIP_BAD_BOXES.setdefault(name, skip_bad_boxes)
    if name not in DatasetCatalog.list():
        kind, _, rest = name.partition(":")
        register = {"voc": _register_voc, "coco": _register_coco, "shapes": _register_shapes}
        if kind not in register or not rest:
            raise DataError(f"DATASETS: {name!r} is not known. Name a source as {_FORMS}.")
        register[kind](name, rest)
    metadata = MetadataCatalog.get(name)
    if not metadata.get("thing_classes"):
        # Detectron2's loaders of json files set the names when the file is read.
        DatasetCatalog.get(name)
    if not metadata.get("thing_classes"):
        raise DataError(f"{name} has no class names: set MetadataCatalog.get(name).thing_classes.")
    return metadata


def class_names(name: str) -> list[str]:
    """Return the class names of a registered source, in the order of their ids."""
    return list(MetadataCatalog.get(name).thing_classes)


def load_records(name: str) -> list[dict]:
    """Return the checked records of a registered source; each source is read once.

    Detectron2's own VOC data sets are read by this package's reader, which marks difficult objects.

    Raises:
        DataError: what is wrong with a file or an object, and where.
    """
    if name not in _RECORDS:
        metadata = MetadataCatalog.get(name)
        skip = _SKIP_BAD_BOXES.get(name, False)
        if metadata.get("evaluator_type") == "pascal_voc":
            folder = Path(metadata.dirname)
            _RECORDS[name] = read_voc(folder, metadata.split, metadata.thing_classes, skip)
        else:
            _RECORDS[name] = _check_records(name, DatasetCatalog.get(name), skip)
    return _RECORDS[name]


def _register_voc(name: str, rest: str) -> None:
    path, _, split = rest.rpartition(":")
    if not path or os.sep in split:
        path, split = rest, ""
    _register_voc_folder(name, Path(os.path.expanduser(path)), split or None)


def _register_shapes(name: str, rest: str) -> None:
    split, _, count = rest.rpartition(":")
    if not split.isidentifier() or not count.isdecimal() or int(count) < 1:
        raise DataError(
            f"{name!r}: generated shapes are named shapes:SPLIT:COUNT, as in 'shapes:train:400'."
        )
    root = os.path.join(os.getenv("DETECTRON2_DATASETS", "datasets"), "shapes")
    _register_voc_folder(name, make_shapes(root, split, int(count)), split)


def _register_voc_folder(name: str, folder: Path, split: str | None) -> None:
    if not folder.is_dir():
        raise DataError(f"{name!r}: the folder {folder} is not there.")
    names = find_class_names(folder)
    DatasetCatalog.register(name, partial(load_records, name))
    MetadataCatalog.get(name).set(
        thing_classes=names,
        dirname=str(folder),
        split=split,
        year=2012 if folder.name == "VOC2012" else 2007,
        evaluator_type="pascal_voc",
    )


def _register_coco(name: str, rest: str) -> None:
    json_file, _, image_root = (os.path.expanduser(part) for part in rest.rpartition(":"))
    if not json_file or not image_root:
        raise DataError(f"{name!r}: COCO data is named coco:ANNOTATIONS.json:IMAGE_FOLDER.")
    if not os.path.isdir(image_root):
        raise DataError(f"{name!r}: the image folder {image_root} is not there.")
    categories = sorted(_read_categories(json_file), key=lambda x: x["id"])
    load: Callable[[], list[dict]] = partial(load_coco_json, json_file, image_root, name)
    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(
        thing_classes=[x["name"] for x in categories],
        json_file=json_file,
        image_root=image_root,
        evaluator_type="coco",
    )


def _read_categories(json_file: str) -> list[dict]:
    try:
        with open(json_file, encoding="utf-8") as file:
            content = json.load(file)
    except OSError as error:
        raise DataError(f"{json_file} can't be read ({error.strerror}).") from error
    except ValueError as error:
        raise DataError(f"{json_file} is broken JSON ({error}): write it again.") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DataError(f"{json_file} has no list {key!r}: it is no COCO detection file.")
    if not content["categories"]:
        raise DataError(f"{json_file}: 'categories' is empty.")
    ids = {category["id"] for category in content["categories"]}
    files = {image["id"]: image["file_name"] for image in content["images"]}
    for annotation in content["annotations"]:
        where = f"{json_file}: annotation {annotation.get('id')}"
        if annotation.get("category_id") not in ids:
            raise DataError(
                f"{where} has the category {annotation.get('category_id')}, which is "
                "not in 'categories'."
            )
        if annotation.get("image_id") not in files:
            raise DataError(
                f"{where} has the image {annotation.get('image_id')}, which is not in 'images'."
            )
    return content["categories"]


def _check_records(name: str, records: list[dict], skip: bool) -> list[dict]:
    """Check the records of a loader that is not this package's; leave bad boxes out or raise."""
    problems = Problems(name, skip)
    num_classes = len(class_names(name))
    checked = []
    for record in records:
        if not os.path.isfile(record["file_name"]):
            raise DataError(f"{name}: the image {record['file_name']} is missing.")
        kept = []
        for number, annotation in enumerate(record.get("annotations", []), 1):
            where = f"{record['file_name']}, object {number}"
            category = annotation["category_id"]
            if not 0 <= category < num_classes:
                raise DataError(
                    f"{name}: {where}: category id {category}, but the {num_classes} classes have "
                    f"the ids 0 to {num_classes - 1}."
                )
            box = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
            reason = box_problem(box, record["width"], record["height"])
            if reason:
                problems.add(f"{where} ({class_names(name)[category]}): box {list(box)} {reason}")
            else:
                kept.append(annotation)
        checked.append({**record, "annotations": kept})
    problems.finish()
    return checked
