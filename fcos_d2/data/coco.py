"""Reader of COCO detection files."""

import json
import math
import os
from collections.abc import Iterator
from typing import Any

from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from .boxes import box_problem
from .findings import DataError, Finding, Origin, Source

# The lists of a file, each after those whose ids it refers to, and the keys that its items need.
_KEYS = {
    "categories": ("id", "name"),
    "images": ("id", "file_name", "height", "width"),
    "annotations": ("id", "image_id", "category_id", "bbox"),
}


def read_coco(source: Source, json_file: str, image_root: str) -> None:
    """Read a COCO detection file into ``source``, as Detectron2's ``load_coco_json`` does.

    Classes are in the order of the category ids. Outlines and keypoints are not read.

    Args:
        source: gets records, in the order of the image ids, and findings; class names that it has
            already must be those of the file.
        json_file: path of the file.
        image_root: folder of its images.

    Raises:
        DataError: the file is not a COCO detection file.
        OSError: the file can't be read.
    """
    content = _load(source, json_file)
    if content is None:
        return
    bad: dict[str, set[int]] = {kind: set() for kind in _KEYS}
    for kind, index, problem in _find_problems(content):
        bad[kind].add(index)
        # A file may be a single line, so the line alone says nothing.
        source.error("bad object", json_file, f"{kind}[{index}]{problem}", item=(kind, index))
    good = {
        kind: [(k, x) for k, x in enumerate(content[kind]) if k not in bad[kind]] for kind in _KEYS
    }
    categories = sorted((x for _, x in good["categories"]), key=lambda x: x["id"])
    ids = {x["id"]: k for k, x in enumerate(categories)}
    _set_class_names(source, json_file, [str(x["name"]) for x in categories])
    source.metadata = {
        "json_file": json_file,
        "image_root": image_root,
        "evaluator_type": "coco",
        "thing_dataset_id_to_contiguous_id": ids,
    }
    positions: dict[Any, int] = {}  # of the records, by image id
    for index, image in sorted(good["images"], key=lambda x: x[1]["id"]):
        path = os.path.join(image_root, image["file_name"])
        if not os.path.isfile(path):
            message = f"the image {path} is missing"
            source.error("bad image", json_file, message, item=("images", index))
            continue
        positions[image["id"]] = len(source.records)
        # 640.0 is a valid size in JSON, but not a valid length of an array.
        size = {key: int(image[key]) for key in ("height", "width")}
        source.records.append(
            {"file_name": path, "image_id": image["id"], **size, "annotations": []}
        )
        source.origins.append(Origin(json_file, ("images", index), "annotations", []))
    for index, item in good["annotations"]:
        if item["image_id"] in positions:
            _add_object(source, positions[item["image_id"]], index, item, ids)


def _load(source: Source, json_file: str) -> dict | None:
    """Return the content of the file; None and a finding if it is broken."""
    with open(PathManager.get_local_path(json_file), encoding="utf-8") as file:
        try:
            content = json.load(file)
        except ValueError as error:  # JSON, or its encoding
            message = f"{json_file} is broken JSON ({error}): write it again."
            source.error("source", json_file, message, line=getattr(error, "lineno", None))
            return None
    for key in _KEYS:
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DataError(f"{json_file} has no list {key!r}: it is not a COCO detection file.")
    if not content["categories"]:
        raise DataError(f"{json_file}: 'categories' is empty.")
    return content


def _set_class_names(source: Source, json_file: str, names: list[str]) -> None:
    if source.class_names and source.class_names != names:
        message = (
            f"the categories of {json_file} are {', '.join(names)}, but the registered classes are "
            f"{', '.join(source.class_names)}: correct MetadataCatalog.get(name).thing_classes"
        )
        source.error("source", json_file, message)
    source.class_names = names


def _add_object(source: Source, position: int, index: int, item: dict, ids: dict) -> None:
    """Add an item of ``annotations`` to its record, or the finding that its box is bad."""
    record, (x, y, width, height) = source.records[position], item["bbox"]
    reason = box_problem((x, y, x + width, y + height), record["width"], record["height"])
    if reason:
        name = source.class_names[ids[item["category_id"]]]
        message = f"annotations[{index}] (id {item['id']}, {name}): box {item['bbox']} {reason}"
        found = Finding("error", "bad box", source.origins[position].file, message)
        source.findings.append(found._replace(item=("annotations", index)))
        return
    record["annotations"].append(
        {
            "bbox": item["bbox"],
            "bbox_mode": BoxMode.XYWH_ABS,
            "category_id": ids[item["category_id"]],
            "iscrowd": item.get("iscrowd") or 0,
        }
    )
    source.origins[position].indices.append(index)


def _find_problems(content: dict) -> Iterator[tuple[str, int, str]]:
    """Yield list, index and first problem of each item that can't be used."""
    ids: dict[str, set] = {kind: set() for kind in _KEYS}
    for kind in _KEYS:
        for index, item in enumerate(content[kind]):
            problem = _item_problem(kind, item, ids[kind])
            if problem is None and kind == "images":
                problem = _image_problem(item)
            if problem is None and kind == "annotations":
                problem = _annotation_problem(item, ids)
            if problem:
                number = item.get("id") if isinstance(item, dict) else None
                yield kind, index, f"{'' if number is None else f' (id {number})'}: {problem}"


def _item_problem(kind: str, item: object, seen: set) -> str | None:
    """Check the keys and the id of an item, and add its id to those ``seen``."""
    missing = [key for key in _KEYS[kind] if not isinstance(item, dict) or key not in item]
    if missing or not isinstance(item, dict):
        return f"it has no {missing[0]!r}"
    number = item["id"]
    if type(number) not in (int, float, str):
        return "the id is neither a number nor a string"
    if seen and isinstance(number, str) != isinstance(next(iter(seen)), str):  # they are sorted
        return f"the id is {number!r}: ids must be all numbers or all strings"
    if number in seen:
        return "the id is repeated"
    seen.add(number)
    return None


def _image_problem(image: dict) -> str | None:
    if not isinstance(image["file_name"], str):
        return f"file_name {image['file_name']!r} is not a string"
    for key in ("height", "width"):
        number = image[key]
        if type(number) not in (int, float) or not 0 < number < math.inf or number % 1:
            return f"{key} {number!r} must be a whole number above 0"
    return None


def _annotation_problem(annotation: dict, ids: dict[str, set]) -> str | None:
    for key, kind in (("category_id", "categories"), ("image_id", "images")):
        number = annotation[key]
        if type(number) not in (int, float, str) or number not in ids[kind]:
            return f"{key} {number} is not an id in {kind!r}"
    box = annotation["bbox"]
    if not isinstance(box, list) or [type(v) in (int, float) for v in box] != [True] * 4:
        return f"bbox {box!r} is not a list of 4 numbers"
    if annotation.get("iscrowd") not in (None, 0, 1):
        return f"iscrowd {annotation['iscrowd']!r} must be 0 or 1"
    if annotation.get("ignore"):
        return "'ignore' is not supported: use 'iscrowd'"
    return None
