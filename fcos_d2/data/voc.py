"""VOC folders: XML annotations to Detectron2's records, and the rule for the class names."""

import logging
import math
import re
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from detectron2.data.datasets.pascal_voc import CLASS_NAMES
from detectron2.structures import BoxMode
from PIL import Image, UnidentifiedImageError

from .checks import DataError, Problems, box_problem

logger = logging.getLogger(__name__)

_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
_EXIF_ORIENTATION = 0x0112
_CORNERS = ("xmin", "ymin", "xmax", "ymax")


def find_class_names(folder: Path) -> list[str]:
    """Return the class names of a VOC folder, in the order of their ids.

    They are the lines of ``classes.txt``, if there is one. Else they are the names in all
    annotations, whatever the split, sorted; but a folder that is called VOC<year> and has no names
    but VOC's own has VOC's 20 in the devkit's order.

    Raises:
        DataError: ``classes.txt`` is empty or repeats a name; or there is no name at all.
    """
    listed = folder / "classes.txt"
    if listed.is_file():
        names = _read_lines(listed)
        repeated = _find_repeated(names)
        if not names or repeated:
            problem = f"repeats {', '.join(repeated)}" if names else "names no class"
            raise DataError(f"{listed} {problem}: it needs one name a line, each once.")
        logger.info("%s: %d classes from its classes.txt", folder, len(names))
        return names
    found: set[str] = set()
    for path in _annotations(folder):
        found.update(_object_name(thing) for thing in _parse(path).iter("object"))
    found.discard("")
    if not found:
        raise DataError(
            f"{folder / 'Annotations'} names no class: it needs VOC annotations (*.xml) with "
            f"objects, or {listed} with one class name a line."
        )
    if re.fullmatch(r"VOC\d{4}", folder.name) and found <= set(CLASS_NAMES):
        logger.info("%s: VOC's 20 classes", folder)
        return list(CLASS_NAMES)
    logger.info("%s: the %d classes of its annotations, sorted", folder, len(found))
    return sorted(found)


def read_voc(
    folder: Path, split: str | None, class_names: Sequence[str], skip_bad_boxes: bool = False
) -> list[dict]:
    """Read the records of one split of a VOC folder.

    A VOC box names its first and its last pixel, counted from 1; a record's box is continuous and
    starts at 0, so it is (xmin - 1, ymin - 1, xmax, ymax).

    Args:
        folder: holds ``JPEGImages``, ``Annotations`` and ``ImageSets/Main``.
        split: ``ImageSets/Main/<split>.txt`` lists the images; None takes every annotation.
        class_names: position is the category id.
        skip_bad_boxes: leave bad boxes out with a logged count.

    Returns:
        Dicts in Detectron2's format; objects have ``iscrowd`` 0 and ``difficult`` 0 or 1.

    Raises:
        DataError: a missing or broken file, an unknown class, a box that is empty, inverted or
            outside its image. The message names the file and the object.
    """
    problems = Problems(str(folder), skip_bad_boxes)
    ids = {name: k for k, name in enumerate(class_names)}
    records = [_read_image(folder, name, ids, problems) for name in _list_images(folder, split)]
    problems.finish()
    return records


def _list_images(folder: Path, split: str | None) -> list[str]:
    if not (folder / "Annotations").is_dir():
        raise DataError(
            f"{folder} is no VOC folder: it has no Annotations/ (expected: JPEGImages/, "
            "Annotations/ and ImageSets/Main/<split>.txt)."
        )
    if split is None:
        names = [path.stem for path in _annotations(folder)]
        if not names:
            raise DataError(f"{folder / 'Annotations'} holds no annotation (*.xml).")
        return names
    path = folder / "ImageSets" / "Main" / f"{split}.txt"
    if not path.is_file():
        there = sorted(p.stem for p in path.parent.glob("*.txt") if "_" not in p.stem)
        raise DataError(
            f"{path} is missing: it lists the image names of the split, one a line. "
            f"Splits that are there: {', '.join(there) or 'none'}. 'voc:{folder}' without a split "
            "takes every annotation."
        )
    names = [_image_name(folder, line) for line in _read_lines(path)]
    if not names:
        raise DataError(f"{path} is empty: it needs the image names of the split, one a line.")
    repeated = _find_repeated(names)
    if repeated:
        raise DataError(f"{path} lists {repeated[0]} more than once: keep one line of each image.")
    return names


def _annotations(folder: Path) -> list[Path]:
    """All annotations, sorted, without the hidden ``._*.xml`` that macOS leaves in archives."""
    paths = (folder / "Annotations").glob("*.xml")
    return sorted(path for path in paths if not path.name.startswith("."))


def _read_lines(path: Path) -> list[str]:
    """The lines of a text file that hold something; Windows editors may begin it with a BOM."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no UTF-8 text ({error}): save it as UTF-8.") from error
    return [line.strip() for line in lines if line.strip()]


def _find_repeated(names: Sequence[str]) -> list[str]:
    return sorted(name for name, count in Counter(names).items() if count > 1)


def _image_name(folder: Path, line: str) -> str:
    """The image of a line; the devkit's lists of one class have a second column of -1, 0 or 1."""
    # A name may hold blanks and even end in " 1": the annotation that is there decides.
    if (folder / "Annotations" / f"{line}.xml").is_file():
        return line
    return re.sub(r"\s+-?[01]$", "", line)


def _read_image(folder: Path, name: str, ids: dict[str, int], problems: Problems) -> dict:
    path = folder / "Annotations" / f"{name}.xml"
    root = _parse(path)
    image = _find_image(folder, name, root, path)
    width, height = _image_size(image)
    _check_size(root, path, image, (width, height))
    record = {"file_name": str(image), "image_id": name, "height": height, "width": width}
    annotations = []
    for number, thing in enumerate(root.iter("object"), 1):
        label = _object_name(thing)
        where = f"{path}, object {number} ({label or 'no name'})"
        if label not in ids:
            raise DataError(
                f"{where}: unknown class; the classes are {', '.join(ids)}. Correct the name, or "
                f"add it to {folder / 'classes.txt'}."
            )
        box = _read_box(thing, where)
        # In VOC's convention a box of one pixel has xmin == xmax; after the shift it has width 1.
        x0, y0, x1, y1 = box[0] - 1, box[1] - 1, box[2], box[3]
        inverted = box[2] < box[0] or box[3] < box[1]
        reason = box_problem((x0, y0, x1, y1), width, height)
        if inverted or reason:
            reason = "is inverted (xmax < xmin or ymax < ymin)" if inverted else reason
            listed = ", ".join(f"{k} {v:g}" for k, v in zip(_CORNERS, box, strict=True))
            problems.add(f"{where}: box {listed} {reason}")
            continue
        annotations.append(
            {
                "bbox": [x0, y0, x1, y1],
                "bbox_mode": BoxMode.XYXY_ABS,
                "category_id": ids[label],
                "iscrowd": 0,
                "difficult": int(_flag(thing, "difficult", where)),
            }
        )
    return {**record, "annotations": annotations}


def _parse(path: Path) -> ET.Element:
    try:
        root = ET.parse(path).getroot()
    except FileNotFoundError as error:
        raise DataError(
            f"{path} is missing: every listed image needs an annotation, an image without objects "
            "one without <object>."
        ) from error
    except (ET.ParseError, ValueError, LookupError) as error:  # the latter two: its encoding
        raise DataError(f"{path} is broken XML ({error}): correct it or write it again.") from error
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]  # some tools write a namespace
    if root.tag != "annotation":
        raise DataError(f"{path} is no VOC annotation: it is a <{root.tag}>, not an <annotation>.")
    return root


def _object_name(thing: ET.Element) -> str:
    return (thing.findtext("name") or "").strip()


def _read_box(thing: ET.Element, where: str) -> list[float]:
    box = thing.find("bndbox")
    if box is None:
        raise DataError(f"{where}: it has no <bndbox>.")
    values = []
    for corner in _CORNERS:
        text = box.findtext(corner, "missing")
        try:
            values.append(float(text))
        except ValueError as error:
            raise DataError(f"{where}: <{corner}> is {text!r}, not a number.") from error
    return values


def _flag(thing: ET.Element, tag: str, where: str) -> bool:
    text = (thing.findtext(tag) or "0").strip()
    if text not in ("0", "1"):
        raise DataError(f"{where}: <{tag}> is {text!r}; it has to be 0 or 1.")
    return text == "1"


def _find_image(folder: Path, name: str, root: ET.Element, annotation: Path) -> Path:
    images = folder / "JPEGImages"
    named = (root.findtext("filename") or "").strip()
    # Tools write a path, sometimes another machine's, into <filename>: its last part is enough.
    named = re.split(r"[\\/]", named)[-1]
    candidates = []
    for suffix in _IMAGE_SUFFIXES:
        candidates += [images / f"{name}{suffix}", images / f"{name}{suffix.upper()}"]
    if named:
        # A copied annotation may still name the image that it was copied from, so <filename>
        # goes before the annotation's own name only where the two agree.
        place = 0 if Path(named).stem == name else len(candidates)
        candidates.insert(place, images / named)
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise DataError(
        f"The image of {annotation} is missing: neither {images / name}.jpg (.jpeg, .png, ...) nor "
        f"its <filename> {named!r} is in {images}."
    )


def _image_size(path: Path) -> tuple[int, int]:
    """Width and height as Detectron2 reads the image, which follows the EXIF orientation."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = image.getexif().get(_EXIF_ORIENTATION) in (5, 6, 7, 8)
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        raise DataError(f"{path} can't be read as an image ({error}): replace it.") from error
    return (height, width) if turned else (width, height)


def _check_size(root: ET.Element, path: Path, image: Path, size: tuple[int, int]) -> None:
    texts = [(root.findtext(f"size/{side}") or "").strip() for side in ("width", "height")]
    try:
        stated = tuple(float(text or 0) for text in texts)
    except ValueError as error:
        raise DataError(f"{path}: <size> is {texts}, not numbers.") from error
    if all(stated) and not all(math.isclose(a, b) for a, b in zip(stated, size, strict=True)):
        raise DataError(
            f"{path}: <size> says {stated[0]:g}x{stated[1]:g}, but {image} has {size[0]}x{size[1]} "
            "pixels, so the boxes may be of another scale. Write the annotation again, or delete "
            "its <size> if the boxes are right."
        )
