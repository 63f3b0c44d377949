"""What no reader looks at: pictures and boxes twice, broken pixels, classes without objects."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
from detectron2.data.detection_utils import SizeMismatchError
from detectron2.structures import BoxMode
from tqdm import tqdm

from ..images import read_image
from .findings import Note, Place
from .reading import Source

MIN_COVERAGE = 90  # percent
_MAX_IMBALANCE = 100  # objects of the commonest class for one of a rare one
_BACKGROUND = {"background", "__background__", "_background_", "bg"}
_TOLERANCE = 0.5  # pixels: COCO files are often rounded


def check_boxes(source: Source) -> list[Note]:
    """Note boxes that stick out of their image, and those that an image has twice."""
    notes = []
    for record in source.records:
        first: dict[tuple, dict] = {}
        for annotation in record["annotations"]:
            place = annotation["place"]
            box = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
            outside = _outside(box, record, place)
            if outside:
                message = f"{place.words} sticks out of the image of "
                message += f"{record['width']:g}x{record['height']:g} pixels by {outside:g}"
                notes.append(Note("warning", place, message, "box sticks out"))
            if annotation.get("iscrowd", 0):
                continue
            other = first.setdefault(tuple(map(float, box)), annotation)
            if other is not annotation:
                message = f"{place.words} has the same box as {other['place'].words}"
                if other["category_id"] != annotation["category_id"]:
                    message += ", but another class"
                notes.append(Note("warning", place, message, "same box"))
    return notes


def _outside(box: Sequence[float], record: dict, place: Place) -> float:
    """How far a box sticks out, in pixels; 0 for what is within rounding."""
    # A VOC box from 0, here -1, has a finding of its own.
    before = [-v for v in box[:2] if place.kind != "object" or v != -1]
    over = max(*before, 0, box[2] - record["width"], box[3] - record["height"])
    return over if over > _TOLERANCE else 0


def check_images(sources: Sequence[Source], image_format: str = "BGR") -> list[Note]:
    """Decode every image as training does, and note those that are the same, byte for byte.

    Args:
        sources: of one run: an image of two sources is noted, too.
        image_format: order of the channels, INPUT.FORMAT.
    """
    notes: list[Note] = []
    first: dict[bytes, tuple[Source, dict]] = {}
    pairs = [(source, record) for source in sources for record in source.records]
    decoded: set[tuple] = set()  # files may be listed more than once
    for source, record in tqdm(pairs, desc="Decoding images", unit="image", disable=None):
        file = record["file_name"]
        key = (file, record["width"], record["height"])
        if key not in decoded:
            decoded.add(key)
            note = _decode(record, image_format)
            notes += [note] if note else []
        try:
            digest = hashlib.blake2b(Path(file).read_bytes(), digest_size=16).digest()
        except OSError:
            continue  # noted already
        other = first.setdefault(digest, (source, record))
        if other[1] is not record:
            notes.append(_same_picture(source, record, *other))
    return notes


def _decode(record: dict, image_format: str) -> Note | None:
    try:
        read_image(record, image_format)
    except SizeMismatchError:
        message = f"{record['file_name']} has not the {record['width']:g}x{record['height']:g} "
        message += "pixels that are stated"
        return Note("error", record["place"], message, "image size")
    except Exception as error:  # a decoder raises anything
        message = f"can't be read as an image ({' '.join(str(error).split())})"
        return Note("error", Place(record["file_name"]), message, "bad image")
    return None


def _same_picture(source: Source, record: dict, other_source: Source, other: dict) -> Note:
    place = Place(record["file_name"])
    if source is not other_source:
        message = f"{source.name}: the same picture as {other['file_name']} of {other_source.name}"
        return Note("warning", place, message, "same picture in two sources")
    if record["file_name"] == other["file_name"]:
        message = f"the image ids {other['image_id']!r} and {record['image_id']!r} are of this file"
        return Note("warning", place, message, "listed twice")
    return Note("warning", place, f"the same picture as {other['file_name']}", "same picture")


def check_classes(
    train: Sequence[Source], test: Sequence[Source], is_trained: Callable[[dict], bool]
) -> list[Note]:
    """Compare the classes of sources, and their objects.

    Args:
        train: sources that are trained on.
        test: sources that are tested on.
        is_trained: whether training learns an annotation of a record.
    """
    sources = [source for source in (*train, *test) if source.class_names]
    notes = [note for source in sources[1:] for note in _compare_names(sources[0], source)]
    for label, count in Counter(sources[0].class_names if sources else ()).items():
        if count > 1:
            message = f"{count} classes are called {label!r}"
            notes.append(Note("warning", Place(sources[0].name), message, "class name twice"))
        if label.strip().lower() in _BACKGROUND:
            message = f"the class {label!r} is probably no object"
            notes.append(Note("warning", Place(sources[0].name), message, "background class"))
    learnt = any(x["annotations"] for source in train for x in source.records)
    for source in sources:
        notes += _check_empty(source, is_fine=learnt and source in train)
    readable = [source for source in train if source.class_names]
    if readable and all(note.kind != "classes" for note in notes):
        notes += _check_counts(readable, [s for s in test if s.class_names], is_trained)
    return notes


def _compare_names(source: Source, other: Source) -> list[Note]:
    if source.class_names == other.class_names:
        return []
    lacking = [x for x in source.class_names if x not in other.class_names]
    more = [x for x in other.class_names if x not in source.class_names]
    message = f"{len(other.class_names)} classes, but {source.name} has {len(source.class_names)}"
    message += f"; lacking here: {', '.join(lacking)}" if lacking else ""
    message += f"; only here: {', '.join(more)}" if more else ""
    if not lacking and not more:
        message = f"the classes of {source.name} in another order"
    return [Note("error", Place(other.name), message, "classes")]


def _check_empty(source: Source, is_fine: bool) -> list[Note]:
    """Note images without objects; a source of them is fine beside others that are trained on."""
    empty = [x for x in source.records if not x["annotations"]]
    if not empty:
        return []
    message = f"{len(empty)} of {len(source.records)} images have no object, the first is "
    message += empty[0]["file_name"]
    severity = "error" if len(empty) == len(source.records) and not is_fine else "warning"
    return [Note(severity, Place(source.name), message, "images without objects")]


def _check_counts(
    train: Sequence[Source], test: Sequence[Source], is_trained: Callable[[dict], bool]
) -> list[Note]:
    """Note classes that training has no or few objects of."""
    counts, tested = Counter(), Counter()
    for count, sources in ((counts, train), (tested, test)):
        for source in sources:
            for record in source.records:
                count.update(x["category_id"] for x in record["annotations"] if is_trained(x))
    notes, place = [], Place(train[0].name)
    names = train[0].class_names
    left_out = sum(len(x["annotations"]) for source in train for x in source.records)
    if not counts and left_out:
        message = f"no object to train on: all {left_out} are difficult or crowds"
        return [Note("error", place, message, "no objects")]
    for category, label in enumerate(names):
        if counts[category]:
            continue
        message = f"no object of {label!r} to train on"
        if tested[category]:
            message += f", but {tested[category]} to test on"
        elif not category and any(map(_has_own_loader, train)):
            message += ": if the ids of your records count from 1, subtract 1"
        notes.append(Note("warning", place, message, "class without objects"))
    most = max(counts.values(), default=0)
    rare = [k for k in range(len(names)) if 0 < counts[k] * _MAX_IMBALANCE < most]
    if rare:
        listed = ", ".join(f"{names[k]} {counts[k]}" for k in rare)
        common = max(range(len(names)), key=counts.__getitem__)
        message = f"{names[common]} has {most} objects, but {listed}"
        notes.append(Note("warning", place, message, "rare classes"))
    return notes


def _has_own_loader(source: Source) -> bool:
    """Whether somebody's own function makes the records: no file of annotations is known."""
    return any(x["place"].file == x["file_name"] for x in source.records[:1])


def check_coverage(
    source: Source, objects: pd.DataFrame, levels: pd.DataFrame, summary: dict[str, pd.DataFrame]
) -> list[Note]:
    """Note objects that no location learns, or only just, and sizes and classes with many.

    That nothing at all is learnt is an error.

    Args:
        source: whose records were matched.
        objects, levels: of :class:`fcos_d2.evaluation.assignment.Assignment`.
        summary: of :func:`fcos_d2.evaluation.assignment.summarize_assignment`.
    """
    notes = []
    places = {
        (record["image_id"], index): annotation["place"]
        for record in source.records
        for index, annotation in enumerate(record["annotations"])
    }
    finest = levels["stride"].iloc[0]
    for row in objects.to_dict("records"):
        place = places[row["image_id"], row["index"]]
        size = f"{row['scaled_width']:.1f}x{row['scaled_height']:.1f} px in the network's input"
        if not row["positives"] and row["candidates"]:
            message = f"{place.words}: its {row['candidates']} locations are inside smaller boxes, "
            message += "or an equal one before it"
            notes.append(Note("warning", place, message, "no location of its own"))
        elif not row["positives"]:
            level = row["expected_level"]
            message = f"{place.words}: {size}, locations {levels['stride'][level]} apart on {level}"
            notes.append(Note("warning", place, message, "no training location"))
        elif min(row["scaled_width"], row["scaled_height"]) < finest:
            message = f"{place.words}: {size}, {row['positives']} locations, stride {finest}"
            notes.append(Note("warning", place, message, "below the finest stride"))
    for group in ("size", "class"):
        table = summary[group]
        for name, row in table[table["coverage"] < MIN_COVERAGE].iterrows():
            message = f"{group} {name}: {row['coverage']:.1f} % of {row['objects']:.0f} objects "
            message += "have a training location"
            notes.append(Note("warning", Place(source.name), message, "coverage"))
    if len(objects) and not objects["positives"].any():
        message = f"none of {len(objects)} objects has a training location"
        notes.append(Note("error", Place(source.name), message, "coverage"))
    return notes


def count_objects(source: Source) -> pd.DataFrame:
    """Return one row a class: objects, images with it, difficult and crowd, and median sides."""
    rows: dict[int, list] = defaultdict(list)
    for record in source.records:
        for x in record["annotations"]:
            box = BoxMode.convert(x["bbox"], x["bbox_mode"], BoxMode.XYWH_ABS)
            flags = bool(x.get("difficult", 0)), bool(x.get("iscrowd", 0))
            rows[x["category_id"]].append((record["image_id"], *flags, *map(float, box[2:])))
    columns = ["image", "difficult", "crowd", "width", "height"]
    table = []
    for category in range(len(source.class_names)):
        found = pd.DataFrame(rows[category], columns=columns)
        table.append(
            {
                "objects": len(found),
                "images": found["image"].nunique(),
                "difficult": int(found["difficult"].sum()),
                "crowd": int(found["crowd"].sum()),
                "median_width": found["width"].median(),
                "median_height": found["height"].median(),
            }
        )
    return pd.DataFrame(table, index=pd.Index(source.class_names, name="class"))


def describe_sizes(source: Source) -> pd.DataFrame:
    """Return least, 5 %, median, 95 % and largest of the sides of images and boxes, in pixels."""
    images = [(x["width"], x["height"]) for x in source.records]
    boxes = [
        BoxMode.convert(x["bbox"], x["bbox_mode"], BoxMode.XYWH_ABS)[2:]
        for record in source.records
        for x in record["annotations"]
    ]
    quantities = {}
    for name, sides in (("image", images), ("box", boxes)):
        frame = pd.DataFrame([[float(a), float(b)] for a, b in sides], columns=["w", "h"])
        quantities[f"{name} width"] = frame["w"]
        quantities[f"{name} height"] = frame["h"]
        quantities[f"{name} width / height"] = frame["w"] / frame["h"]
    shares = {"least": 0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "largest": 1}
    return pd.DataFrame(
        {
            label: {name: values.quantile(share) for name, values in quantities.items()}
            for label, share in shares.items()
        }
    )
