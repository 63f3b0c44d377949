"""Read a source as training does, but to its end: each problem becomes a note."""

import math
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from json import JSONDecodeError
from pathlib import Path
from typing import NamedTuple
from xml.etree.ElementTree import ParseError

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from .. import voc
from ..checks import BadBoxError, DataError
from ..sources import (
    check_annotation,
    coco_problems,
    find_coco,
    find_folder,
    read_coco,
    register_source,
)
from .findings import Note, Place


class Source(NamedTuple):
    """What could be read of a data source.

    Attributes:
        name: as in DATASETS.
        class_names: in the order of the ids; empty if they are not known.
        records: Detectron2 dataset dicts of the images without an error of their own, with the
            objects that can be trained on. A record and an annotation has its ``place``.
        notes: what is wrong.
    """

    name: str
    class_names: list[str]
    records: list[dict]
    notes: list[Note]


def read_source(name: str, skip_bad_boxes: bool = False) -> Source:
    """Read a source, whatever is wrong with it.

    Args:
        name: any name that DATASETS.TRAIN may have.
        skip_bad_boxes: bad boxes are warnings, as DATASETS.SKIP_BAD_BOXES leaves them out.
    """
    notes: list[Note] = []
    try:
        class_names, records = _read(name, notes)
    except DataError as error:
        place = Place(name)
        if isinstance(error.__cause__, JSONDecodeError):
            place = Place(find_coco(name)[0], "line", error.__cause__.lineno)
        notes.append(Note("error", place, str(error), "source"))
        class_names, records = [], []
    if skip_bad_boxes:
        notes = [x._replace(severity="warning") if x.kind == "bad box" else x for x in notes]
    return Source(name, class_names, records, notes)


def _read(name: str, notes: list[Note]) -> tuple[list[str], list[dict]]:
    folder = find_folder(name)
    if folder is not None:
        return _read_voc(name, *folder, None, notes)
    if name.startswith("coco:"):
        return _read_coco(*find_coco(name), notes)
    if name not in DatasetCatalog.list():
        register_source(name)  # raises: the name is of no form
    metadata = MetadataCatalog.get(name)
    if metadata.get("dirname") and metadata.get("year"):
        names = metadata.thing_classes
        return _read_voc(name, Path(metadata.dirname), metadata.split, names, notes)
    if metadata.get("json_file") and metadata.get("evaluator_type") == "coco":
        return _read_coco(metadata.json_file, metadata.image_root, notes)
    return _read_records(name, notes)


# VOC folders


def _read_voc(
    name: str, folder: Path, split: str | None, class_names: Sequence[str] | None, notes: list[Note]
) -> tuple[list[str], list[dict]]:
    if not folder.is_dir():
        raise DataError(f"{name!r}: the folder {folder} is not there.")
    listed = voc.list_images(folder, split)
    broken: set[Path] = set()
    if class_names is None:
        class_names = _find_class_names(folder, broken, notes)
    if split is not None:
        _note_repeated(folder, split, listed, notes)
    ids = {label: k for k, label in enumerate(class_names)}
    records = []
    for image in dict.fromkeys(listed):
        path = folder / "Annotations" / f"{image}.xml"
        if path not in broken:
            record = _read_voc_image(folder, image, path, ids, notes)
            records += [record] if record else []
    return list(class_names), records


def _find_class_names(folder: Path, broken: set[Path], notes: list[Note]) -> list[str]:
    """Find the class names as training does; put annotations that can't be read to ``broken``."""
    if (folder / "classes.txt").is_file():
        return voc.read_class_list(folder / "classes.txt")
    found: set[str] = set()
    for path in voc.annotation_files(folder):
        try:
            found.update(voc.object_name(x) for x in voc.parse_annotation(path).iter("object"))
        except DataError as error:
            broken.add(path)
            notes.append(_file_note(error, path))
    return voc.order_class_names(folder, found - {""})


def _note_repeated(folder: Path, split: str, listed: Sequence[str], notes: list[Note]) -> None:
    repeated = {name for name, count in Counter(listed).items() if count > 1}
    if not repeated:
        return
    path = voc.split_file(folder, split)
    first: dict[str, int] = {}
    for line, text in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        name = voc.image_name(folder, text.strip())
        if name in repeated and first.setdefault(name, line) != line:
            message = f"lists {name} again, after line {first[name]}"
            notes.append(Note("error", Place(str(path), "line", line), message, "listed twice"))


def _read_voc_image(
    folder: Path, name: str, path: Path, ids: dict[str, int], notes: list[Note]
) -> dict | None:
    """Return the record of an image, or None if there is an error that is not one object's."""
    # Where the image is not to be had, its objects are checked without its size.
    size: tuple[float, float] = (math.inf, math.inf)
    image = None
    try:
        root = voc.parse_annotation(path)
    except DataError as error:
        notes.append(_file_note(error, path))
        return None
    try:
        found = voc.find_image(folder, name, root, path)
        size = voc.image_size(found)
        voc.check_size(root, path, found, size)
        image = found
    except DataError as error:
        kind = "size" if math.isfinite(size[0]) else ""
        message = str(error).replace(str(path), path.name)
        notes.append(Note("error", Place(str(path), kind), message, "bad file"))
    annotations = []
    for index, thing in enumerate(root.iter("object")):
        words = f"object {index + 1} ({voc.object_name(thing) or 'no name'})"
        place = Place(str(path), "object", index, words)
        try:
            annotation = voc.read_object(thing, words, ids, size)
        except DataError as error:
            notes.append(_object_note(error, place))
            continue
        annotations.append({**annotation, "place": place})
        if -1 in annotation["bbox"][:2]:  # xmin or ymin of 0
            corners = "xmin {:g}, ymin {:g}".format(*(x + 1 for x in annotation["bbox"][:2]))
            notes.append(Note("warning", place, f"{words}: {corners}", "box from 0"))
    if image is None:
        return None
    record = {"file_name": str(image), "image_id": name, "width": size[0], "height": size[1]}
    return {**record, "annotations": annotations, "place": Place(str(path))}


def _file_note(error: DataError, path: Path) -> Note:
    place = Place(str(path))
    if isinstance(error.__cause__, ParseError):
        place = Place(str(path), "line", error.__cause__.position[0])
    return Note("error", place, str(error).replace(str(path), path.name), "bad file")


def _object_note(error: DataError, place: Place) -> Note:
    kind = "bad box" if isinstance(error, BadBoxError) else "bad object"
    return Note("error", place, str(error), kind)


# COCO files


def _read_coco(json_file: str, image_root: str, notes: list[Note]) -> tuple[list[str], list[dict]]:
    content = read_coco(json_file)
    bad: dict[str, set[int]] = defaultdict(set)
    for kind, index, problem in coco_problems(content):
        bad[kind].add(index)
        # A file may be on one line, so that the line alone says nothing.
        item = f"{kind}[{index}]"
        message = problem if problem.startswith(item) else f"{item}: {problem}"
        notes.append(Note("error", Place(json_file, kind, index), message, "bad object"))
    good = {
        kind: [(k, item) for k, item in enumerate(content[kind]) if k not in bad[kind]]
        for kind in ("images", "annotations", "categories")
    }
    categories = sorted((x for _, x in good["categories"]), key=lambda x: x["id"])
    class_names = [str(x["name"]) for x in categories]
    ids = {x["id"]: k for k, x in enumerate(categories)}
    records = {}
    for index, image in sorted(good["images"], key=lambda x: x[1]["id"]):
        record = _coco_record(json_file, image_root, index, image)
        if os.path.isfile(record["file_name"]):
            records[image["id"]] = record
        else:
            message = f"the image {record['file_name']} is missing"
            notes.append(Note("error", record["place"], message, "bad image"))
    for index, item in good["annotations"]:
        if item["image_id"] in records:
            place = Place(json_file, "annotations", index)
            _add_coco_object(records[item["image_id"]], item, ids, class_names, place, notes)
    return class_names, list(records.values())


def _coco_record(json_file: str, image_root: str, index: int, image: dict) -> dict:
    return {
        "file_name": os.path.join(image_root, image["file_name"]),
        "image_id": image["id"],
        "width": int(image["width"]),
        "height": int(image["height"]),
        "annotations": [],
        "place": Place(json_file, "images", index, f"image {image['id']}"),
    }


def _add_coco_object(
    record: dict,
    item: dict,
    ids: dict,
    class_names: Sequence[str],
    place: Place,
    notes: list[Note],
) -> None:
    """Put an item of ``annotations`` into its record, or a note why not."""
    annotation = {
        "bbox": item["bbox"],
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": ids[item["category_id"]],
        "iscrowd": item.get("iscrowd", 0),
    }
    words = f"annotation {item['id']} (annotations[{place.index}])"
    try:
        check_annotation(annotation, record, class_names, words)
    except DataError as error:
        notes.append(_object_note(error, place))
        return
    words = f"{words[:-1]}, {class_names[annotation['category_id']]})"
    record["annotations"].append({**annotation, "place": place._replace(words=words)})


# Records that somebody's own loader makes


def _read_records(name: str, notes: list[Note]) -> tuple[list[str], list[dict]]:
    try:
        class_names = list(register_source(name).thing_classes)
        loaded = DatasetCatalog.get(name)
    except FileNotFoundError as error:
        raise DataError(f"{name}: {error.filename} is missing.") from error
    records, ids = [], set()
    for number, record in enumerate(loaded):
        missing = [key for key in ("file_name", "image_id", "height", "width") if key not in record]
        if missing:
            message = f"record {number} has no {missing[0]!r}"
            notes.append(Note("error", Place(name), message, "bad object"))
            continue
        place = Place(record["file_name"])
        if not os.path.isfile(record["file_name"]):
            notes.append(Note("error", place, "the image is missing", "bad image"))
            continue
        kept = []
        for index, annotation in enumerate(record.get("annotations", [])):
            words = f"object {index + 1}"
            ids.add(annotation.get("category_id"))
            try:
                _check_keys(annotation, words)
                check_annotation(annotation, record, class_names, words)
            except DataError as error:
                notes.append(_object_note(error, place))
            else:
                words = f"{words} ({class_names[annotation['category_id']]})"
                kept.append({**annotation, "place": place._replace(words=words)})
        size = {key: int(record[key]) for key in ("height", "width")}
        records.append({**record, **size, "annotations": kept, "place": place})
    if 0 not in ids and len(class_names) in ids:
        message = f"no object has the category id 0, but some have {len(class_names)}: the ids "
        message += "count from 1. Subtract 1 in the function that makes the records."
        notes.append(Note("error", Place(name), message, "bad object"))
    return class_names, records


def _check_keys(annotation: dict, words: str) -> None:
    for key in ("bbox", "bbox_mode", "category_id"):
        if key not in annotation:
            raise DataError(f"{words} has no {key!r}: it is no annotation of Detectron2's form.")
