"""VOC folders: hand-computed records, and an error that names file and object for each fault."""

import logging
import re
from pathlib import Path

import pytest
from detectron2.data.datasets.pascal_voc import CLASS_NAMES, load_voc_instances
from detectron2.data.detection_utils import read_image
from detectron2.structures import BoxMode

from fcos_d2.data import DataError, load_records, register_source

REAL = Path(__file__).resolve().parents[2].parent / "shared" / "voc2007" / "VOC2007"


def read(voc, split=None, **options):
    (voc.path / "classes.txt").write_text("car\ntraffic light\n")
    return load_records(voc.source(split), **options)


def read_one(voc, **options):
    (record,) = read(voc, **options)
    return record


def assert_fails(voc, *parts, split=None):
    """The error of reading names each of these."""
    with pytest.raises(DataError) as caught:
        read(voc, split)
    for part in parts:
        assert str(part) in str(caught.value)


def names_of(voc):
    return register_source(voc.source()).thing_classes


def test_record_by_hand(voc):
    """VOC's box names its first and last pixel, from 1; the record's is continuous, from 0.

    xmin 11, ymin 6, xmax 30, ymax 20: columns 11 to 30 are 20 columns, of which the first begins
    at x = 10 and the last ends at x = 30; rows 6 to 20 are 15 rows from y = 5 to y = 20. The whole
    image, 1 1 60 40, becomes 0 0 60 40, and the pixel in the corner, 60 40 60 40, has an area of 1.
    """
    voc.add(
        "a",
        [
            ("car", "11 6 30 20"),
            ("traffic light", "1 1 60 40", 1),
            ("car", "60 40 60 40", 0),
            ("car", "10.5 6 30.25 20"),
        ],
    )
    record = read_one(voc)
    assert (record["image_id"], record["width"], record["height"]) == ("a", 60, 40)
    assert record["file_name"] == str(voc.image("a"))
    common = {"bbox_mode": BoxMode.XYXY_ABS, "iscrowd": 0}
    assert record["annotations"] == [
        {"bbox": [10, 5, 30, 20], "category_id": 0, "difficult": 0, **common},
        {"bbox": [0, 0, 60, 40], "category_id": 1, "difficult": 1, **common},
        {"bbox": [59, 39, 60, 40], "category_id": 0, "difficult": 0, **common},
        {"bbox": [9.5, 5, 30.25, 20], "category_id": 0, "difficult": 0, **common},
    ]


def test_parts_of_a_person_are_no_objects(voc):
    """VOC2012 has <part> with its own <name> and <bndbox> before the object's end."""
    voc.add("a", [("car", "1 1 9 9")])
    text = voc.xml("a").read_text()
    part = "<part><name>head</name><bndbox><xmin>2</xmin></bndbox></part></object>"
    voc.xml("a").write_text(text.replace("</object>", part))
    assert [x["bbox"] for x in read_one(voc)["annotations"]] == [[0, 0, 9, 9]]


def test_box_that_sticks_out_is_kept(voc):
    voc.add("a", [("car", "-3 1 70 9")])
    assert read_one(voc)["annotations"][0]["bbox"] == [-4, 0, 70, 9]


def test_image_without_objects(voc):
    voc.add("a")
    assert read_one(voc)["annotations"] == []


def test_namespace_is_ignored(voc):
    voc.add("a", [("car", "1 1 9 9")], head='<annotation xmlns="http://example.org/voc">')
    assert len(read_one(voc)["annotations"]) == 1


# Splits


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a -1\nb  1\nmy image  0\n", ["a", "b", "my image"]),  # the devkit's lists of one class
        ("my image\nshot 1\n", ["my image", "shot 1"]),
        ("\ufeffa\r\nb\r\n", ["a", "b"]),  # written by a Windows editor
        ("b\n\n  a  \n", ["b", "a"]),
    ],
)
def test_forms_of_a_split(voc, text, expected):
    for name in ("a", "b", "my image", "shot 1"):
        voc.add(name)
    voc.add_split("train", "").write_bytes(text.encode())
    assert [record["image_id"] for record in read(voc, "train")] == expected


def test_without_a_split(voc):
    for name in ("b", "a"):
        voc.add(name)
    assert [record["image_id"] for record in read(voc)] == ["a", "b"]


def test_missing_split_says_which_are_there(voc):
    voc.add("a")
    voc.add_split("val", "a\n")
    voc.add_split("car_val", "a 1\n")
    assert_fails(voc, "train.txt is missing", "Available splits: val.", split="train")


def test_empty_split_and_repeated_image(voc):
    voc.add("a")
    assert_fails(voc, voc.add_split("train", "\n \n"), "is empty", split="train")
    path = voc.add_split("train", "a\na\n")
    assert_fails(voc, f"{path}:2: lists a again, after line 1", split="train")


def test_no_voc_folder(voc, tmp_path):
    with pytest.raises(DataError, match="not a VOC folder: it has no Annotations/"):
        load_records(f"voc:{tmp_path}")
    assert_fails(voc, voc.path / "Annotations", "holds no annotation")


# Images


@pytest.mark.parametrize(
    ("file_name", "filename"),
    [
        *((x, "a.jpg") for x in ("a.JPG", "a.jpeg", "a.png", "a.PNG")),  # of another suffix
        *(("b.png", x) for x in (r"C:\data\my images\b.png", "/home/me/b.png", "b.png")),
    ],
)
def test_image_found_by_its_name_or_filename(voc, file_name, filename):
    voc.add_image(file_name)
    voc.add_xml("a", filename=filename)
    assert read_one(voc)["file_name"].endswith(f"JPEGImages/{file_name}")


def test_filename_settles_which_of_two_suffixes(voc):
    voc.add_image("a.jpg", size=(8, 8))
    voc.add_image("a.png")
    voc.add_xml("a", filename="a.png")
    assert read_one(voc)["file_name"].endswith("JPEGImages/a.png")


def test_stale_filename_does_not_name_the_image(voc):
    """a.xml was copied from b.xml, <filename> and all: its image is a.jpg, as in Detectron2."""
    voc.add("b")
    voc.add("a", filename="b.jpg")
    assert [Path(r["file_name"]).name for r in read(voc)] == ["a.jpg", "b.jpg"]


def test_missing_image(voc):
    voc.add_xml("a", filename="c.png")
    assert_fails(voc, voc.xml("a"), "missing", voc.image("a"), "'c.png'")


def test_broken_image(voc):
    voc.add("a", size=None)
    (voc.image("a")).write_bytes(b"<html>not found</html>")
    assert_fails(voc, voc.image("a"), "can't be read as an image")


@pytest.mark.parametrize("size", [None, (0, 0), ("", "")])
def test_missing_size_is_taken_from_the_image(voc, size):
    voc.add("a", size=size)
    record = read_one(voc)
    assert (record["width"], record["height"]) == (60, 40)


@pytest.mark.parametrize("size", [(60, 41), (30, 20), (40, 60), ("nan", 40), ("wide", 40)])
def test_size_that_contradicts_the_image(voc, size):
    voc.add("a", size=size)
    said = (
        ["not numbers"] if "wide" in size else [f"{voc.image('a')} has 60x40", "delete its <size>"]
    )
    assert_fails(voc, f"{voc.xml('a')}: <size>", *said)


@pytest.mark.parametrize("orientation", [None, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
def test_size_follows_the_rotation_that_detectron2_applies(voc, orientation):
    voc.add_image(exif_orientation=orientation)
    voc.add_xml("a", size=None)
    record = read_one(voc)
    assert read_image(record["file_name"]).shape[:2] == (record["height"], record["width"])


# Annotations and objects


@pytest.mark.parametrize(
    "content",
    [
        b"<annotation><object></annotation>",
        b"",
        b"<annotation><filename>\xff.jpg</filename></annotation>",
        b'<?xml version="1.0" encoding="gb2312"?><annotation></annotation>',
        b'<?xml version="1.0" encoding="klingon"?><annotation></annotation>',
    ],
)
def test_broken_xml(voc, content):
    voc.add("a")
    voc.xml("a").write_bytes(content)
    assert_fails(voc, voc.xml("a"), "broken XML")


def test_another_xml_and_a_missing_one(voc):
    voc.add("a")
    voc.xml("a").write_text("<annotations><image/></annotations>")
    assert_fails(voc, voc.xml("a"), "its root is <annotations>")
    voc.add_split("train", "b\n")
    assert_fails(voc, voc.xml("b"), "missing: every listed image", split="train")


BAD_BOXES = {
    "9 1 8 9": "is inverted",  # one pixel would be 9 1 9 9
    "30 1 2 9": "is inverted",
    "1 30 9 2": "is inverted",
    "61 1 70 9": "lies wholly outside the image of 60x40",
    "1 41 9 50": "lies wholly outside",
    "-9 1 0 9": "lies wholly outside",
    "nan 1 9 9": "has a coordinate that is not finite",
    "1 1 inf 9": "has a coordinate that is not finite",
}
BOX = "1 1 9 9"


@pytest.mark.parametrize(
    ("thing", "said"),
    [
        (("cat", BOX), "(cat): unknown class; the classes are car, traffic light. Correct"),
        (("", BOX), "(no name): unknown class"),
        (("car", "1 two 9 9"), "(car): <ymin> is 'two', not a number"),
        (("car", "1 2,5 9 9"), "(car): <ymin> is '2,5', not a number"),
        (("car", "1 1 9"), "(car): <ymax> is 'missing', not a number"),
        (("car", BOX, "yes"), "(car): <difficult> is 'yes'"),
        *(
            (("car", x), "(car): box xmin {}, ymin {}, xmax {}, ymax {} ".format(*x.split()) + why)
            for x, why in BAD_BOXES.items()
        ),
    ],
)
def test_object_with_a_fault(voc, thing, said):
    voc.add("a", [("car", BOX), thing])
    assert_fails(voc, f"{voc.xml('a')}: object 2 {said}")


def test_object_without_box(voc):
    voc.add("a", [("car", BOX)])
    text = voc.xml("a").read_text()
    voc.xml("a").write_text(re.sub("<bndbox>.*</bndbox>", "", text))
    assert_fails(voc, f"{voc.xml('a')}: object 1 (car)", "no <bndbox>")


def test_bad_boxes_are_reported_together_or_skipped(voc, caplog):
    objects = [("car", corners) for corners in [BOX, *BAD_BOXES]]
    for name in ("a", "b"):
        voc.add(name, objects)
    count = 2 * len(BAD_BOXES)
    assert_fails(voc, f"{count} errors in", voc.xml("a"), voc.xml("b"), "DATASETS.SKIP_BAD_BOXES")
    with caplog.at_level(logging.WARNING):
        records = read(voc, skip_bad_boxes=True)
    assert [[x["bbox"] for x in record["annotations"]] for record in records] == [
        [[0, 0, 9, 9]]
    ] * 2
    assert f"skipped {count} bad box(es)" in caplog.text


# Class names


def test_names_from_classes_txt(voc):
    (voc.path / "classes.txt").write_bytes(b"\xef\xbb\xbftraffic light\r\n\r\n car \r\n")
    voc.add("a", [("dog", "1 1 9 9")])
    assert names_of(voc) == ["traffic light", "car"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\n", "names no class"),
        (b"b\na\nb\na\n", "repeats a, b"),
        ("Stra\xdfe".encode("latin-1"), "not UTF-8"),
    ],
)
def test_unusable_classes_txt(voc, content, said):
    voc.add("a")
    (voc.path / "classes.txt").write_bytes(content)
    with pytest.raises(DataError, match=said) as caught:
        names_of(voc)
    assert str(voc.path / "classes.txt") in str(caught.value)


def test_all_names_that_are_found_sorted(voc):
    voc.add("a", [("traffic light", "1 1 9 9"), ("car", "1 1 9 9")])
    voc.add("b", [("bus", "1 1 9 9"), (" car ", "1 1 9 9")])
    (voc.path / "Annotations" / "._b.xml").write_bytes(b"\0\5\x16\7")  # a hidden file of macOS
    voc.add_split("train", "a\n")
    assert names_of(voc) == ["bus", "car", "traffic light"]
    assert len(load_records(voc.source())) == 2


@pytest.mark.parametrize(
    ("folder", "label", "expected"),
    [
        ("VOC2007", "dog", list(CLASS_NAMES)),
        ("VOC2012", "dog", list(CLASS_NAMES)),
        ("VOC2007", "traffic light", ["car", "traffic light"]),
        ("VOC", "dog", ["car", "dog"]),
        ("myVOC2007", "dog", ["car", "dog"]),
    ],
)
def test_vocs_names_in_a_folder_of_vocs_name(make_voc, folder, label, expected):
    voc = make_voc(folder)
    voc.add("a", [("car", "1 1 9 9"), (label, "1 1 9 9")])
    assert names_of(voc) == expected


def test_no_names_at_all(voc):
    voc.add("a")
    with pytest.raises(DataError, match="names no class"):
        names_of(voc)


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/voc2007")
def test_equals_detectron2_on_real_data():
    """Everything but ``difficult`` and the size, which Detectron2 cuts to an int of <size>."""
    names = register_source(f"voc:{REAL}:val").thing_classes
    assert names == list(CLASS_NAMES)
    ours = load_records(f"voc:{REAL}:val")
    theirs = load_voc_instances(str(REAL), "val", names)
    assert len(ours) == len(theirs) > 2000
    for a, b in zip(ours, theirs, strict=True):
        assert {k: a[k] for k in b if k != "annotations"} == {
            k: b[k] for k in b if k != "annotations"
        }
        for x, y in zip(a["annotations"], b["annotations"], strict=True):
            assert {key: x[key] for key in y} == y
    assert 0 < sum(x["difficult"] for r in ours for x in r["annotations"]) < 3054
