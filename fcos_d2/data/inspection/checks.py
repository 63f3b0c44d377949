"""Checks that no reader makes: duplicate images and boxes, broken pixels, missing objects."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from detectron2.data.detection_utils import SizeMismatchError
from tqdm import tqdm

from ..boxes import box_xywh, box_xyxy
from ..dataset_mapper import training_role
from ..findings import Finding, Source
from ..images import read_image
from .assignment import Assignment, summarize_assignment

MIN_COVERAGE = 90  # percent
_MAX_IMBALANCE = 100  # ratio of the most frequent class to a rare one, in objects
_BACKGROUND = {"background", "__background__", "_background_", "bg"}
_TOLERANCE = 0.5  # pixels: COCO files are often rounded


def check_boxes(source: Source) -> list[Finding]:
    """Find boxes that stick out of their image, and boxes that an image has twice."""
    findings = []
    for number, record in enumerate(source.records):
        first: dict[tuple, int] = {}
        for k, annotation in enumerate(record["annotations"]):
            box = box_xyxy(annotation)
            # A VOC box from 0, here -1, has a finding of its own.
            is_voc = source.origins[number].element == "object"
            before = [-v for v in box[:2] if not (is_voc and v == -1)]
            over = max(*before, 0, box[2] - record["width"], box[3] - record["height"])
            if over > _TOLERANCE:
                size = f"{record['width']:g}x{record['height']:g}"
                text = f" sticks out of the image of {size} pixels by {over:g}"
                findings.append(source.object_warning("box sticks out", number, k, text))
            if annotation.get("iscrowd", 0):
                continue
            other = first.setdefault(tuple(box), k)
            if other != k:
                text = f" has the same box as {source.label(number, other)}"
                if record["annotations"][other]["category_id"] != annotation["category_id"]:
                    text += ", but another class"
                findings.append(source.object_warning("same box", number, k, text))
    return findings


def check_images(sources: Sequence[Source], image_format: str = "BGR") -> list[Finding]:
    """Decode every image as training does, and find those that are equal byte for byte.

    Args:
        sources: of one run; an image of two sources is a finding, too.
        image_format: order of the channels, INPUT.FORMAT.
    """
    findings: list[Finding] = []
    first: dict[bytes, tuple[Source, dict]] = {}
    decoded: set[tuple] = set()  # files may be listed more than once
    images = [(s, i, record) for s in sources for i, record in enumerate(s.records)]
    for source, i, record in tqdm(images, desc="Decoding images", unit="image", disable=None):
        key = (record["file_name"], record["width"], record["height"])
        if key not in decoded:
            decoded.add(key)
            findings += _check_pixels(source, i, image_format)
        try:
            content = Path(record["file_name"]).read_bytes()
        except OSError:
            continue  # found by _check_pixels
        digest = hashlib.blake2b(content, digest_size=16).digest()
        other = first.setdefault(digest, (source, record))
        if other[1] is not record:
            findings.append(_same_picture(source, record, *other))
    return findings


def _check_pixels(source: Source, i: int, image_format: str) -> list[Finding]:
    record, origin = source.records[i], source.origins[i]
    try:
        read_image(record, image_format)
    except SizeMismatchError:
        size = f"{record['width']:g}x{record['height']:g}"
        message = f"{record['file_name']} does not have the stated size of {size} pixels"
        return [Finding("error", "image size", origin.file, message, origin.item)]
    except Exception as error:  # decoders raise all kinds
        message = f"can't be read as an image ({' '.join(str(error).split())})"
        return [Finding("error", "bad image", record["file_name"], message)]
    return []


def _same_picture(source: Source, record: dict, other_source: Source, other: dict) -> Finding:
    kind, message = "same picture", f"the same picture as {other['file_name']}"
    if source is not other_source:
        kind = "same picture in two sources"
        message = f"{source.name}: {message} of {other_source.name}"
    elif record["file_name"] == other["file_name"]:
        kind = "listed twice"
        message = f"the image ids {other['image_id']!r} and {record['image_id']!r} share this file"
    return Finding("warning", kind, record["file_name"], message)


def check_classes(train: Sequence[Source], test: Sequence[Source], difficult: str) -> list[Finding]:
    """Compare the classes of sources, and count their objects.

    Args:
        train: training sources.
        test: test sources.
        difficult: INPUT.DIFFICULT.
    """
    sources = [source for source in (*train, *test) if source.class_names]
    if not sources:
        return []
    differences = [x for source in sources[1:] for x in _compare_names(sources[0], source)]
    findings = [*differences, *_check_names(sources[0])]
    trained_on = any(x["annotations"] for source in train for x in source.records)
    for source in sources:
        # A source of background images is fine beside others that are trained on.
        findings += _check_empty(source, is_fine=trained_on and source in train)
    train, test = ([x for x in group if x.class_names] for group in (train, test))
    if train and not differences:
        findings += _check_counts(train, test, difficult)
    return findings


def _compare_names(source: Source, other: Source) -> list[Finding]:
    names, others = source.class_names, other.class_names
    if names == others:
        return []
    missing, extra = (
        ", ".join(x for x in a if x not in b) for a, b in ((names, others), (others, names))
    )
    message = f"the classes of {source.name} in another order"
    if missing or extra:
        message = f"{len(others)} classes, but {source.name} has {len(names)}"
        message += f"; missing here: {missing}" if missing else ""
        message += f"; only here: {extra}" if extra else ""
    return [Finding("error", "classes", other.name, message)]


def _check_names(source: Source) -> list[Finding]:
    findings = []
    for label, count in Counter(source.class_names).items():
        if count > 1:
            message = f"{count} classes are called {label!r}"
            findings.append(Finding("warning", "class name twice", source.name, message))
        if label.strip().lower() in _BACKGROUND:
            message = f"the class {label!r} is probably not an object"
            findings.append(Finding("warning", "background class", source.name, message))
    return findings


def _check_empty(source: Source, is_fine: bool) -> list[Finding]:
    empty = [x for x in source.records if not x["annotations"]]
    if not empty:
        return []
    message = f"{len(empty)} of {len(source.records)} images have no object, the first is "
    message += empty[0]["file_name"]
    severity = "error" if len(empty) == len(source.records) and not is_fine else "warning"
    return [Finding(severity, "images without objects", source.name, message)]


def _check_counts(train: Sequence[Source], test: Sequence[Source], difficult: str) -> list[Finding]:
    """Find classes with no or few training objects."""
    counts, tested = _count_classes(train, difficult), _count_classes(test, difficult)
    name, names = train[0].name, train[0].class_names
    total = sum(len(x["annotations"]) for source in train for x in source.records)
    if not counts and total:
        message = f"no object to train on: all {total} are difficult or crowds"
        return [Finding("error", "no objects", name, message)]
    findings = []
    for category, label in enumerate(names):
        if counts[category]:
            continue
        message = f"no object of {label!r} to train on"
        if tested[category]:
            message += f", but {tested[category]} to test on"
        elif not category and any(x.origins and not x.origins[0].element for x in train):
            message += ": if the ids of your records count from 1, subtract 1"
        findings.append(Finding("warning", "class without objects", name, message))
    most = max(counts.values(), default=0)
    rare = [k for k in range(len(names)) if 0 < counts[k] * _MAX_IMBALANCE < most]
    if rare:
        common = max(range(len(names)), key=counts.__getitem__)
        listed = ", ".join(f"{names[k]} {counts[k]}" for k in rare)
        message = f"{names[common]} has {most} objects, but {listed}"
        findings.append(Finding("warning", "rare classes", name, message))
    return findings


def _count_classes(sources: Sequence[Source], difficult: str) -> Counter:
    """Count the objects that are neither ignored nor dropped."""
    objects = (x for source in sources for record in source.records for x in record["annotations"])
    trained = (x for x in objects if training_role(x, difficult, "drop") == "train")
    return Counter(x["category_id"] for x in trained)


def check_coverage(source: Source, assignment: Assignment) -> list[Finding]:
    """Find objects with no or few training locations, and sizes and classes with many such."""
    findings = _check_objects(source, assignment)
    summary = summarize_assignment(assignment, source.class_names)
    for group in ("size", "class"):
        table = summary[group]
        for name, row in table[table["coverage"] < MIN_COVERAGE].iterrows():
            message = f"{group} {name}: {row['coverage']:.1f} % of {row['objects']:.0f} objects "
            message += "have a training location"
            findings.append(Finding("warning", "coverage", source.name, message))
    objects = assignment.objects
    if len(objects) and not objects["positives"].any():
        message = f"none of {len(objects)} objects has a training location"
        findings.append(Finding("error", "coverage", source.name, message))
    return findings


def _check_objects(source: Source, assignment: Assignment) -> list[Finding]:
    findings = []
    strides = assignment.levels["stride"]
    finest = strides.iloc[0]
    numbers = {record["image_id"]: i for i, record in enumerate(source.records)}
    for row in assignment.objects.to_dict("records"):
        size = f"{row['scaled_width']:.1f}x{row['scaled_height']:.1f} px in the network's input"
        if not row["positives"] and row["candidates"]:
            kind = "no location of its own"
            text = f"its {row['candidates']} locations are inside smaller boxes, or an equal one "
            text += "before it"
        elif not row["positives"]:
            kind, level = "no training location", row["expected_level"]
            text = f"{size}, locations {strides[level]} apart on {level}"
        elif min(row["scaled_width"], row["scaled_height"]) < finest:
            kind = "below the finest stride"
            text = f"{size}, {row['positives']} locations, stride {finest}"
        else:
            continue
        number = numbers[row["image_id"]]
        findings.append(source.object_warning(kind, number, row["index"], f": {text}"))
    return findings


def count_objects(source: Source) -> pd.DataFrame:
    """Return per class: objects, images with it, difficult and crowd, and median sides."""
    groups = _objects(source).groupby("category")
    table = pd.DataFrame(
        {
            "objects": groups.size(),
            "images": groups["image"].nunique(),
            "difficult": groups["difficult"].sum(),
            "crowd": groups["crowd"].sum(),
            "median_width": groups["width"].median(),
            "median_height": groups["height"].median(),
        }
    ).reindex(range(len(source.class_names)))
    counts = ["objects", "images", "difficult", "crowd"]
    table[counts] = table[counts].fillna(0).astype(int)
    return table.set_axis(pd.Index(source.class_names, name="class"))


def describe_sizes(source: Source) -> pd.DataFrame:
    """Return minimum, 5 %, median, 95 % and maximum of image and box sides, in pixels."""
    images = pd.DataFrame(source.records, columns=["width", "height"], dtype=float)
    quantities = {}
    for name, frame in (("image", images), ("box", _objects(source))):
        quantities[f"{name} width"] = frame["width"]
        quantities[f"{name} height"] = frame["height"]
        quantities[f"{name} width / height"] = frame["width"] / frame["height"]
    shares = {"least": 0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "largest": 1}
    return pd.DataFrame(
        {
            label: {name: values.quantile(share) for name, values in quantities.items()}
            for label, share in shares.items()
        }
    )


def _objects(source: Source) -> pd.DataFrame:
    """Return one row per object; its sides are those of its box in pixels."""
    rows = [
        (
            record["image_id"],
            x["category_id"],
            *(int(bool(x.get(key, 0))) for key in ("difficult", "iscrowd")),
            *box_xywh(x)[2:],
        )
        for record in source.records
        for x in record["annotations"]
    ]
    columns = ["image", "category", "difficult", "crowd", "width", "height"]
    return pd.DataFrame(rows, columns=columns).astype({"width": float, "height": float})
