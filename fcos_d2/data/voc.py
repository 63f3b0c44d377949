"""Reader of VOC folders."""

import logging
import math
import os
import re
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from detectron2.data.datasets.pascal_voc import CLASS_NAMES
from detectron2.structures import BoxMode
from PIL import Image, UnidentifiedImageError

from .boxes import box_problem
from .findings import DataError, Finding, ObjectError, Origin, Source

logger = logging.getLogger(__name__)

_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
_EXIF_ORIENTATION = 0x0112
_CORNERS = ("xmin", "ymin", "xmax", "ymax")


class _Object(NamedTuple):
    name: str
    corners: list[str] | None  # None without a <bndbox>
    difficult: str


class _Annotation(NamedTuple):
    """The texts of an annotation file."""

    filename: str
    size: list[str]  # width, height
    objects: list[_Object]


def read_voc(source: Source, folder: Path, split: str | None) -> None:
    """Read one split of a VOC folder into ``source``.

    A VOC box names its first and its last pixel, counted from 1; a record's box is continuous and
    starts at 0: (xmin - 1, ymin - 1, xmax, ymax).

    Class names are those that ``source`` has already, else the lines of ``classes.txt``, else the
    names in all annotations of the folder, whatever the split, sorted; but a folder called
    VOC<year> with no names but VOC's own has VOC's 20 in the devkit's order.

    Args:
        source: gets records (objects have ``iscrowd`` 0 and ``difficult`` 0 or 1) and findings.
        folder: holds ``JPEGImages``, ``Annotations`` and ``ImageSets/Main``.
        split: ``ImageSets/Main/<split>.txt`` lists the images; None takes every annotation.

    Raises:
        DataError: there are no images or no class names to read.
    """
    if not folder.is_dir():
        raise DataError(f"{source.name!r}: the folder {folder} is not there.")
    images = _list_images(source, folder, split)
    if not source.class_names and (folder / "classes.txt").is_file():
        source.class_names = _read_class_list(folder / "classes.txt")
    # Names that are not given are collected from all annotations.
    stems = images if source.class_names else [*images, *_annotation_stems(folder)]
    annotations = {stem: _parse(source, _xml(folder, stem)) for stem in dict.fromkeys(stems)}
    if not source.class_names:
        found = {
            x.name for annotation in annotations.values() if annotation for x in annotation.objects
        }
        source.class_names = _order_class_names(folder, found - {""})
    ids = {name: k for k, name in enumerate(source.class_names)}
    for name in images:
        if annotation := annotations[name]:
            _read_image(source, folder, name, annotation, ids)
    source.metadata = {
        "dirname": str(folder),
        "split": split,
        "year": 2012 if folder.name == "VOC2012" else 2007,
        "evaluator_type": "pascal_voc",
    }


def _xml(folder: Path, stem: str) -> str:
    return os.path.join(folder, "Annotations", f"{stem}.xml")


def _annotation_stems(folder: Path) -> list[str]:
    """Return all annotations, sorted, without the hidden ``._*.xml`` of archives made by macOS."""
    paths = (folder / "Annotations").glob("*.xml")
    return sorted(path.stem for path in paths if not path.name.startswith("."))


def _list_images(source: Source, folder: Path, split: str | None) -> list[str]:
    """Return the image names of a split in its order; a repeated name is a finding."""
    if not (folder / "Annotations").is_dir():
        raise DataError(
            f"{folder} is not a VOC folder: it has no Annotations/ (expected: JPEGImages/, "
            "Annotations/ and ImageSets/Main/<split>.txt)."
        )
    if split is None:
        if stems := _annotation_stems(folder):
            return stems
        raise DataError(f"{folder / 'Annotations'} holds no annotation (*.xml).")
    path = folder / "ImageSets" / "Main" / f"{split}.txt"
    if not path.is_file():
        splits = sorted(p.stem for p in path.parent.glob("*.txt") if "_" not in p.stem)
        raise DataError(
            f"{path} is missing: it lists the image names of the split, one per line. "
            f"Available splits: {', '.join(splits) or 'none'}. 'voc:{folder}' without a split "
            "takes every annotation."
        )
    first: dict[str, int] = {}
    for number, line in _read_lines(path):
        # The devkit's lists of one class have a second column of -1, 0 or 1. But a name may hold
        # blanks and even end in " 1": the annotation that exists decides.
        name = line if os.path.isfile(_xml(folder, line)) else re.sub(r"\s+-?[01]$", "", line)
        if first.setdefault(name, number) != number:
            message = f"lists {name} again, after line {first[name]}: keep one line per image"
            source.error("listed twice", path, message, line=number)
    if not first:
        raise DataError(f"{path} is empty: it needs the image names of the split, one per line.")
    return list(first)


def _read_lines(path: Path) -> list[tuple[int, str]]:
    """Return the lines of a text file that are not blank, and their numbers from 1."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows editors may write a BOM
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error}): save it as UTF-8.") from error
    lines = enumerate(map(str.strip, text.splitlines()), 1)
    return [(number, line) for number, line in lines if line]


def _read_class_list(path: Path) -> list[str]:
    names = [line for _, line in _read_lines(path)]
    repeated = sorted(name for name, count in Counter(names).items() if count > 1)
    if not names or repeated:
        problem = f"repeats {', '.join(repeated)}" if names else "names no class"
        raise DataError(f"{path} {problem}: it needs one name per line, each once.")
    logger.info("%s: %d classes from its classes.txt", path.parent, len(names))
    return names


def _order_class_names(folder: Path, found: Collection[str]) -> list[str]:
    if not found:
        raise DataError(
            f"{folder / 'Annotations'} names no class: it needs VOC annotations (*.xml) with "
            f"objects, or {folder / 'classes.txt'} with one class name per line."
        )
    if re.fullmatch(r"VOC\d{4}", folder.name) and set(found) <= set(CLASS_NAMES):
        logger.info("%s: VOC's 20 classes", folder)
        return list(CLASS_NAMES)
    logger.info("%s: the %d classes of its annotations, sorted", folder, len(found))
    return sorted(found)


def _parse(source: Source, path: str) -> _Annotation | None:
    """Read an annotation file, ignoring XML namespaces; a finding if it can't be used."""
    problem, line = "", None
    try:
        root = ET.parse(path).getroot()
    except FileNotFoundError:
        problem = "missing: every listed image needs an annotation, one without <object> if it has "
        problem += "no objects"
    except (ET.ParseError, ValueError, LookupError) as error:  # the latter two: its encoding
        problem = f"broken XML ({error}): correct it or write it again"
        line = error.position[0] if isinstance(error, ET.ParseError) else None
    else:
        for element in root.iter():
            element.tag = element.tag.rpartition("}")[2]
        if root.tag != "annotation":
            problem = f"not a VOC annotation: its root is <{root.tag}>, not <annotation>"
    if problem:
        source.error("bad file", path, problem, line=line)
        return None
    size = [_text(root, f"size/{side}") for side in ("width", "height")]
    return _Annotation(_text(root, "filename"), size, list(map(_object, root.iter("object"))))


def _text(element: ET.Element, tag: str) -> str:
    return (element.findtext(tag) or "").strip()


def _object(element: ET.Element) -> _Object:
    box = element.find("bndbox")
    corners = None if box is None else [box.findtext(corner, "missing") for corner in _CORNERS]
    return _Object(_text(element, "name"), corners, _text(element, "difficult") or "0")


def _read_image(
    source: Source, folder: Path, name: str, annotation: _Annotation, ids: dict[str, int]
) -> None:
    """Add the record of an image, unless there is an error that is not a single object's."""
    path = _xml(folder, name)
    num_findings = len(source.findings)
    # If the image can't be read, objects are checked without its size.
    image, size = "", (math.inf, math.inf)
    try:
        image = _find_image(folder, name, annotation.filename)
        size = _image_size(image)
        _check_size(annotation.size, image, size)
    except DataError as error:
        item = ("size", 0) if math.isfinite(size[0]) else None
        source.error("bad file", path, str(error), item=item)
    usable = len(source.findings) == num_findings
    objects, indices = [], []
    for index, thing in enumerate(annotation.objects):
        label, item = f"object {index + 1} ({thing.name or 'no name'})", ("object", index)
        try:
            objects.append(_read_object(thing, ids, size))
        except ObjectError as error:
            source.error(error.kind, path, f"{label}: {error}", item=item)
            continue
        indices.append(index)
        x, y = objects[-1]["bbox"][:2]
        if -1 in (x, y):
            message = f"{label}: xmin {x + 1:g}, ymin {y + 1:g}"
            source.findings.append(Finding("warning", "box from 0", path, message, item))
    if usable:
        record = {"file_name": image, "image_id": name, "height": size[1], "width": size[0]}
        source.records.append({**record, "annotations": objects})
        source.origins.append(Origin(path, ("size", 0), "object", indices))


def _read_object(thing: _Object, ids: dict[str, int], size: tuple[float, float]) -> dict:
    """Return the annotation of an object in an image of ``size`` (width, height).

    Raises:
        ObjectError: an unknown class, a bad box, or text that is not the number it should be.
    """
    if thing.name not in ids:
        message = f"unknown class; the classes are {', '.join(ids)}. Correct the name, or add it "
        raise ObjectError("bad object", message + "to the folder's classes.txt.")
    if thing.corners is None:
        raise ObjectError("bad object", "it has no <bndbox>")
    corners = []
    for tag, text in zip(_CORNERS, thing.corners, strict=True):
        try:
            corners.append(float(text))
        except ValueError:
            raise ObjectError("bad object", f"<{tag}> is {text!r}, not a number") from None
    # In VOC's convention a box of one pixel has xmin == xmax; after the shift its width is 1.
    box = [corners[0] - 1, corners[1] - 1, corners[2], corners[3]]
    inverted = corners[2] < corners[0] or corners[3] < corners[1]
    reason = "is inverted (xmax < xmin or ymax < ymin)" if inverted else box_problem(box, *size)
    if reason:
        listed = ", ".join(f"{k} {v:g}" for k, v in zip(_CORNERS, corners, strict=True))
        raise ObjectError("bad box", f"box {listed} {reason}")
    if thing.difficult not in ("0", "1"):
        raise ObjectError("bad object", f"<difficult> is {thing.difficult!r}; it must be 0 or 1")
    return {
        "bbox": box,
        "bbox_mode": BoxMode.XYXY_ABS,
        "category_id": ids[thing.name],
        "iscrowd": 0,
        "difficult": int(thing.difficult),
    }


def _find_image(folder: Path, name: str, filename: str) -> str:
    """Return the image of an annotation: the file of its name, else of its ``<filename>``."""
    images = os.path.join(folder, "JPEGImages")
    # Tools write a path, sometimes another machine's, into <filename>: its last part is enough.
    filename = re.split(r"[\\/]", filename)[-1]
    candidates = [name + end for x in _IMAGE_SUFFIXES for end in (x, x.upper())]
    if filename:
        # A copied annotation may still name the image that it was copied from, so <filename>
        # comes first only if it agrees with the annotation's own name.
        candidates.insert(0 if Path(filename).stem == name else len(candidates), filename)
    for candidate in candidates:
        path = os.path.join(images, candidate)
        if os.path.isfile(path):
            return path
    raise DataError(
        f"the image is missing: neither {images}/{name}.jpg (.jpeg, .png, ...) nor its <filename> "
        f"{filename!r} is in {images}"
    )


def _image_size(path: str) -> tuple[int, int]:
    """Return width and height as Detectron2 reads the image, turned by its EXIF orientation."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = image.getexif().get(_EXIF_ORIENTATION) in (5, 6, 7, 8)
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        raise DataError(f"{path} can't be read as an image ({error}): replace it") from error
    return (height, width) if turned else (width, height)


def _check_size(texts: Sequence[str], image: str, size: tuple[int, int]) -> None:
    """Compare the ``<size>`` of an annotation, if it has one, with the image's (width, height)."""
    try:
        stated = [float(text or 0) for text in texts]
    except ValueError as error:
        raise DataError(f"<size> is {texts}, not numbers") from error
    if all(stated) and not all(math.isclose(a, b) for a, b in zip(stated, size, strict=True)):
        raise DataError(
            f"<size> says {stated[0]:g}x{stated[1]:g}, but {image} has {size[0]}x{size[1]} pixels, "
            "so the boxes may be of another scale. Write the annotation again, or delete its "
            "<size> if the boxes are right."
        )
