"""Data sources by name: ``voc:PATH:SPLIT``, ``coco:JSON:IMAGES``, ``shapes:SPLIT:COUNT``."""

import json
import os
from collections import Counter
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
# The lists of a COCO file, and the keys that Detectron2's loader reads of each item.
_COCO_KEYS = {
    "images": ("id", "file_name", "height", "width"),
    "annotations": ("id", "image_id", "category_id", "bbox"),
    "categories": ("id", "name"),
}
_UNUSED = ("segmentation", "keypoints")
# Records of the sources that were read already, by name.
_RECORDS: dict[str, list[dict]] = {}
# Names of the sources whose bad boxes are left out.
_SKIP_BAD_BOXES: set[str] = set()


def register_source(name: str, skip_bad_boxes: bool = False) -> Metadata:
    """Make a data source known to Detectron2 under exactly this name.

    A name that is known already is left as it is, but for its bad boxes: whoever asks that they
    be skipped, before or after, has them skipped.

    Args:
        name: one of the forms above.
        skip_bad_boxes: what :func:`load_records` does with boxes that are empty, inverted or
            outside their image: leave them out with a logged count instead of an error.

    Returns:
        Its metadata, with ``thing_classes``.

    Raises:
        DataError: the name has none of the forms, or the source can't be read.
    """
    if skip_bad_boxes:
        _SKIP_BAD_BOXES.add(name)
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
        skip = name in _SKIP_BAD_BOXES
        # What Detectron2's register_pascal_voc and _register_voc_folder set, and nothing else does.
        if metadata.get("dirname") and metadata.get("year"):
            folder = Path(metadata.dirname)
            _RECORDS[name] = read_voc(folder, metadata.split, metadata.thing_classes, skip)
        else:
            try:
                records = DatasetCatalog.get(name)
            except FileNotFoundError as error:
                raise DataError(
                    f"{name}: {error.filename} is missing. $DETECTRON2_DATASETS is "
                    f"{os.getenv('DETECTRON2_DATASETS', 'datasets')!r}: set it to the folder of "
                    "the data sets that Detectron2 knows by name."
                ) from error
            _RECORDS[name] = _check_records(name, records, skip)
    return _RECORDS[name]


def _register_voc(name: str, rest: str) -> None:
    path, _, split = rest.rpartition(":")
    if not path or os.sep in split:
        path, split = rest, ""
    # Absolute, so that the name of the folder is known even where the path is ".".
    folder = Path(os.path.abspath(os.path.expanduser(path)))
    _register_voc_folder(name, folder, split or None)


def _register_shapes(name: str, rest: str) -> None:
    split, _, count = rest.rpartition(":")
    if not split.isidentifier() or not count.isdecimal() or int(count) < 1:
        raise DataError(
            f"{name!r}: generated shapes are named shapes:SPLIT:COUNT, as in 'shapes:train:400'."
        )
    datasets = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
    root = os.path.join(datasets, "shapes")
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
    for key in _COCO_KEYS:
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DataError(f"{json_file} has no list {key!r}: it is no COCO detection file.")
    if not content["categories"]:
        raise DataError(f"{json_file}: 'categories' is empty.")
    _check_coco(json_file, content)
    return content["categories"]


def _check_coco(json_file: str, content: dict) -> None:
    """Check what Detectron2's loader takes for granted; its errors name no file."""
    for kind, keys in _COCO_KEYS.items():
        for number, item in enumerate(content[kind]):
            missing = [key for key in keys if key not in item]
            if missing:
                raise DataError(f"{json_file}: {kind}[{number}] has no {missing[0]!r}.")
        ids = Counter(item["id"] for item in content[kind])
        if len(ids) < len(content[kind]):
            raise DataError(f"{json_file}: {kind} repeats the id {ids.most_common(1)[0][0]}.")
    known = {
        "category_id": {category["id"] for category in content["categories"]},
        "image_id": {image["id"] for image in content["images"]},
    }
    for annotation in content["annotations"]:
        where = f"{json_file}: annotation {annotation['id']}"
        for key, ids in known.items():
            if annotation[key] not in ids:
                raise DataError(f"{where} has the {key} {annotation[key]}, which is not there.")
        box = annotation["bbox"]
        if not isinstance(box, list) or [type(v) in (int, float) for v in box] != [True] * 4:
            raise DataError(f"{where} has the bbox {box!r}, which is not a list of 4 numbers.")
        if annotation.get("ignore"):
            raise DataError(f"{where} has 'ignore', which Detectron2 can't read: use 'iscrowd'.")
        outlines = annotation.get("segmentation")
        # Detectron2's loader drops the whole annotation, and its box would be background.
        if (
            outlines
            and isinstance(outlines, list)
            and not any(len(outline) >= 6 and len(outline) % 2 == 0 for outline in outlines)
        ):
            raise DataError(
                f"{where} has a 'segmentation' without a polygon of 3 points: delete the key."
            )


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
                # Outlines and keypoints are not trained on, and all records stay in memory.
                kept.append({k: v for k, v in annotation.items() if k not in _UNUSED})
        checked.append({**record, "annotations": kept})
    problems.finish()
    return checked
