"""Data sources by name: ``voc:PATH:SPLIT``, ``coco:JSON:IMAGES``, ``shapes:SPLIT:COUNT``."""

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.structures import BoxMode

from .checks import BadBoxError, DataError, Problems, box_problem
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
        _register(name)
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


def _register(name: str) -> None:
    folder = find_folder(name)
    if folder is not None:
        _register_voc_folder(name, *folder)
    elif name.startswith("coco:") and name != "coco:":
        _register_coco(name, *find_coco(name))
    else:
        raise DataError(f"DATASETS: {name!r} is not known. Name a source as {_FORMS}.")


def find_folder(name: str) -> tuple[Path, str | None] | None:
    """Return the VOC folder and the split that ``voc:...`` or ``shapes:...`` names.

    Shapes are drawn if need be. None is for a name of another form.

    Raises:
        DataError: shapes that are misspelt.
    """
    kind, _, rest = name.partition(":")
    if kind == "shapes" and rest:
        return _find_shapes(name, rest)
    if kind != "voc" or not rest:
        return None
    path, _, split = rest.rpartition(":")
    if not path or os.sep in split:
        path, split = rest, ""
    # Absolute, so that the name of the folder is known even where the path is ".".
    return Path(os.path.abspath(os.path.expanduser(path))), split or None


def _find_shapes(name: str, rest: str) -> tuple[Path, str]:
    split, _, count = rest.rpartition(":")
    if not split.isidentifier() or not count.isdecimal() or int(count) < 1:
        raise DataError(
            f"{name!r}: generated shapes are named shapes:SPLIT:COUNT, as in 'shapes:train:400'."
        )
    datasets = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
    root = os.path.join(datasets, "shapes")
    return make_shapes(root, split, int(count)), split


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


def find_coco(name: str) -> tuple[str, str]:
    """Return the json file and the image folder that ``coco:...`` names.

    Raises:
        DataError: another form, or a folder that is not there.
    """
    rest = name.removeprefix("coco:")
    json_file, _, image_root = (os.path.expanduser(part) for part in rest.rpartition(":"))
    if not json_file or not image_root:
        raise DataError(f"{name!r}: COCO data is named coco:ANNOTATIONS.json:IMAGE_FOLDER.")
    if not os.path.isdir(image_root):
        raise DataError(f"{name!r}: the image folder {image_root} is not there.")
    return json_file, image_root


def _register_coco(name: str, json_file: str, image_root: str) -> None:
    content = read_coco(json_file)
    for _, _, problem in coco_problems(content):
        raise DataError(f"{json_file}: {problem}")
    categories = sorted(content["categories"], key=lambda x: x["id"])
    load: Callable[[], list[dict]] = partial(load_coco_json, json_file, image_root, name)
    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(
        thing_classes=[x["name"] for x in categories],
        json_file=json_file,
        image_root=image_root,
        evaluator_type="coco",
    )


def read_coco(json_file: str) -> dict:
    """Return what a COCO file holds: lists of images, annotations and categories.

    Raises:
        DataError: the file can't be read, or has not these lists.
    """
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
    return content


def coco_problems(content: dict) -> Iterator[tuple[str, int, str]]:
    """Check what Detectron2's loader takes for granted; its errors name no file.

    Yields:
        For each item with a problem its list, its index there and the first problem in words.
    """
    ids: dict[str, set] = {}
    for kind in ("categories", "images", "annotations"):  # the last needs the ids of the others
        ids[kind] = set()
        for index, item in enumerate(content[kind]):
            problem = _item_problem(kind, index, item, ids[kind])
            if problem is None and kind == "images":
                problem = _image_problem(item)
            if problem is None and kind == "annotations":
                problem = _annotation_problem(item, ids)
            if problem:
                yield kind, index, problem


def _item_problem(kind: str, index: int, item: object, seen: set) -> str | None:
    """Check the keys and the id of an item, and put its id to those that were seen."""
    missing = [key for key in _COCO_KEYS[kind] if not isinstance(item, dict) or key not in item]
    if missing:
        return f"{kind}[{index}] has no {missing[0]!r}."
    number = item["id"]
    if type(number) not in (int, float, str):
        return f"{kind}[{index}] has the id {number!r}, which is neither a number nor a text."
    # Detectron2 sorts them.
    if seen and isinstance(number, str) != isinstance(next(iter(seen)), str):
        return f"{kind}[{index}] has the id {number!r}: ids are all numbers or all texts."
    if number in seen:
        return f"{kind} repeats the id {number}."
    seen.add(number)
    return None


def _image_problem(image: dict) -> str | None:
    if not isinstance(image["file_name"], str):
        return f"image {image['id']} has the file_name {image['file_name']!r}, which is no text."
    for key in ("height", "width"):
        number = image[key]
        if type(number) not in (int, float) or not 0 < number < math.inf or number % 1:
            where = f"image {image['id']}"
            return f"{where} has the {key} {number!r}: it has to be a whole number above 0."
    return None


def _annotation_problem(annotation: dict, ids: dict[str, set]) -> str | None:
    where = f"annotation {annotation['id']}"
    for key, kind in (("category_id", "categories"), ("image_id", "images")):
        number = annotation[key]
        if type(number) not in (int, float, str) or number not in ids[kind]:
            return f"{where} has the {key} {number}, which is not there."
    box = annotation["bbox"]
    if not isinstance(box, list) or [type(v) in (int, float) for v in box] != [True] * 4:
        return f"{where} has the bbox {box!r}, which is not a list of 4 numbers."
    if annotation.get("iscrowd") not in (None, 0, 1):
        return f"{where} has the iscrowd {annotation['iscrowd']!r}: it has to be 0 or 1."
    if annotation.get("ignore"):
        return f"{where} has 'ignore', which Detectron2 can't read: use 'iscrowd'."
    outlines = annotation.get("segmentation")
    if outlines and isinstance(outlines, list):
        if not all(isinstance(outline, list) for outline in outlines):
            return f"{where} has a 'segmentation' that is no list of lists: delete the key."
        # Detectron2's loader drops the whole annotation, and its box would be background.
        if not any(len(outline) >= 6 and len(outline) % 2 == 0 for outline in outlines):
            return f"{where} has a 'segmentation' without a polygon of 3 points: delete the key."
    return None


def _check_records(name: str, records: list[dict], skip: bool) -> list[dict]:
    """Check the records of a loader that is not this package's; leave bad boxes out or raise."""
    problems = Problems(name, skip)
    checked = []
    for index, record in enumerate(records):
        for key in ("file_name", "height", "width"):
            if key not in record:
                raise DataError(f"{name}: record {index} has no {key!r}.")
        if not os.path.isfile(record["file_name"]):
            raise DataError(f"{name}: the image {record['file_name']} is missing.")
        kept = []
        for number, annotation in enumerate(record.get("annotations", []), 1):
            where = f"{record['file_name']}, object {number}"
            try:
                check_annotation(annotation, record, class_names(name), where)
            except BadBoxError as error:
                problems.add(str(error))
            except DataError as error:
                raise DataError(f"{name}: {error}") from error
            else:
                # Outlines and keypoints are not trained on, and all records stay in memory.
                kept.append({k: v for k, v in annotation.items() if k not in _UNUSED})
        # 640.0 is a valid size in JSON, but no length of an array.
        size = {key: int(record[key]) for key in ("height", "width")}
        checked.append({**record, **size, "annotations": kept})
    problems.finish()
    return checked


def check_annotation(
    annotation: dict, record: dict, class_names: Sequence[str], where: str
) -> None:
    """Check class and box of an object in Detectron2's format.

    Args:
        annotation: of the object.
        record: gives the size of its image.
        class_names: names of the K classes.
        where: what names the object in the message.

    Raises:
        BadBoxError: a box that is empty, inverted or outside its image.
        DataError: a category id outside [0, K).
    """
    category, count = annotation["category_id"], len(class_names)
    if not 0 <= category < count:
        raise DataError(
            f"{where}: category id {category}, but the {count} classes have the ids 0 to "
            f"{count - 1}."
        )
    box = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
    reason = box_problem(box, record["width"], record["height"])
    if reason:
        raise BadBoxError(f"{where} ({class_names[category]}): box {list(box)} {reason}")
