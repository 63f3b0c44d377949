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

from .checks import BadBoxError, DataError, Problems, box_problem

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
    if (folder / "classes.txt").is_file():
        return read_class_list(folder / "classes.txt")
    found: set[str] = set()
    for path in annotation_files(folder):
        found.update(object_name(thing) for thing in parse_annotation(path).iter("object"))
    return order_class_names(folder, found - {""})


def read_class_list(path: Path) -> list[str]:
    """Return the class names of a ``classes.txt``.

    Raises:
        DataError: it is empty or repeats a name.
    """
    names = _read_lines(path)
    repeated = _find_repeated(names)
    if not names or repeated:
        problem = f"repeats {', '.join(repeated)}" if names else "names no class"
        raise DataError(f"{path} {problem}: it needs one name a line, each once.")
    logger.info("%s: %d classes from its classes.txt", path.parent, len(names))
    return names


def order_class_names(folder: Path, found: set[str]) -> list[str]:
    """Return the names ``found`` in the annotations of a folder without ``classes.txt`` in order.

    Raises:
        DataError: there is none.
    """
    if not found:
        raise DataError(
            f"{folder / 'Annotations'} names no class: it needs VOC annotations (*.xml) with "
            f"objects, or {folder / 'classes.txt'} with one class name a line."
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
    names = list_images(folder, split)
    repeated = _find_repeated(names)
    if repeated:
        path = split_file(folder, split)
        raise DataError(f"{path} lists {repeated[0]} more than once: keep one line of each image.")
    return names


def split_file(folder: Path, split: str) -> Path:
    """Return the file that lists the images of a split."""
    return folder / "ImageSets" / "Main" / f"{split}.txt"


def list_images(folder: Path, split: str | None) -> list[str]:
    """Return the image names of a split, in its order and as often as it lists them.

    Raises:
        DataError: no VOC folder, or a split that is missing or empty.
    """
    if not (folder / "Annotations").is_dir():
        raise DataError(
            f"{folder} is no VOC folder: it has no Annotations/ (expected: JPEGImages/, "
            "Annotations/ and ImageSets/Main/<split>.txt)."
        )
    if split is None:
        names = [path.stem for path in annotation_files(folder)]
        if not names:
            raise DataError(f"{folder / 'Annotations'} holds no annotation (*.xml).")
        return names
    path = split_file(folder, split)
    if not path.is_file():
        there = sorted(p.stem for p in path.parent.glob("*.txt") if "_" not in p.stem)
        raise DataError(
            f"{path} is missing: it lists the image names of the split, one a line. "
            f"Splits that are there: {', '.join(there) or 'none'}. 'voc:{folder}' without a split "
            "takes every annotation."
        )
    names = [image_name(folder, line) for line in _read_lines(path)]
    if not names:
        raise DataError(f"{path} is empty: it needs the image names of the split, one a line.")
    return names


def annotation_files(folder: Path) -> list[Path]:
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


def image_name(folder: Path, line: str) -> str:
    """The image of a line; the devkit's lists of one class have a second column of -1, 0 or 1."""
    # A name may hold blanks and even end in " 1": the annotation that is there decides.
    if (folder / "Annotations" / f"{line}.xml").is_file():
        return line
    return re.sub(r"\s+-?[01]$", "", line)


def _read_image(folder: Path, name: str, ids: dict[str, int], problems: Problems) -> dict:
    path = folder / "Annotations" / f"{name}.xml"
    root = parse_annotation(path)
    image = find_image(folder, name, root, path)
    width, height = image_size(image)
    check_size(root, path, image, (width, height))
    annotations = []
    for number, thing in enumerate(root.iter("object"), 1):
        where = f"{path}, object {number} ({object_name(thing) or 'no name'})"
        try:
            annotations.append(read_object(thing, where, ids, (width, height)))
        except BadBoxError as error:
            problems.add(str(error))
    return {
        "file_name": str(image),
        "image_id": name,
        "height": height,
        "width": width,
        "annotations": annotations,
    }


def read_object(
    thing: ET.Element, where: str, ids: dict[str, int], size: tuple[float, float]
) -> dict:
    """Read an ``<object>`` as an annotation of a record.

    Args:
        thing: the element.
        where: its file and number, for the message.
        ids: category id of each class name.
        size: width and height of its image.

    Raises:
        BadBoxError: a box that is empty, inverted or outside its image.
        DataError: an unknown class, or something that is missing or no number.
    """
    label = object_name(thing)
    if label not in ids:
        raise DataError(
            f"{where}: unknown class; the classes are {', '.join(ids)}. Correct the name, or add "
            "it to the folder's classes.txt."
        )
    corners = read_corners(thing, where)
    # In VOC's convention a box of one pixel has xmin == xmax; after the shift it has width 1.
    box = [corners[0] - 1, corners[1] - 1, corners[2], corners[3]]
    inverted = corners[2] < corners[0] or corners[3] < corners[1]
    reason = "is inverted (xmax < xmin or ymax < ymin)" if inverted else box_problem(box, *size)
    if reason:
        listed = ", ".join(f"{k} {v:g}" for k, v in zip(_CORNERS, corners, strict=True))
        raise BadBoxError(f"{where}: box {listed} {reason}")
    return {
        "bbox": box,
        "bbox_mode": BoxMode.XYXY_ABS,
        "category_id": ids[label],
        "iscrowd": 0,
        "difficult": int(_flag(thing, "difficult", where)),
    }


def parse_annotation(path: Path) -> ET.Element:
    """Return the ``<annotation>`` of a file, its tags without namespaces.

    Raises:
        DataError: the file is missing, broken or of another kind; of broken XML the cause is the
            ``ParseError``, with its position.
    """
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


def object_name(thing: ET.Element) -> str:
    """Return the class name of an ``<object>``, "" without one."""
    return (thing.findtext("name") or "").strip()


def read_corners(thing: ET.Element, where: str) -> list[float]:
    """Return xmin, ymin, xmax, ymax of an ``<object>`` as they are written.

    Raises:
        DataError: no box, or a corner that is no number.
    """
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


def find_image(folder: Path, name: str, root: ET.Element, annotation: Path) -> Path:
    """Return the image of an annotation: of its name, else of its ``<filename>``.

    Raises:
        DataError: there is none.
    """
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


def image_size(path: Path) -> tuple[int, int]:
    """Width and height as Detectron2 reads the image, which follows the EXIF orientation.

    Raises:
        DataError: it is no image.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = image.getexif().get(_EXIF_ORIENTATION) in (5, 6, 7, 8)
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        raise DataError(f"{path} can't be read as an image ({error}): replace it.") from error
    return (height, width) if turned else (width, height)


def check_size(root: ET.Element, path: Path, image: Path, size: tuple[int, int]) -> None:
    """Compare the ``<size>`` of an annotation, if it has one, with the image's (width, height).

    Raises:
        DataError: they differ, or ``<size>`` is no number.
    """
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
