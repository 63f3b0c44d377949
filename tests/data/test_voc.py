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


def test_split_lists_the_images_in_its_order(voc):
    for name in ("a", "b", "c"):
        voc.add(name)
    voc.add_split("train", "c\n\n  a  \n")
    assert [record["image_id"] for record in read(voc, "train")] == ["c", "a"]
    assert [record["image_id"] for record in read(voc)] == ["a", "b", "c"]


def test_second_column_of_a_split_is_ignored(voc):
    """The devkit's lists of one class: "000012 -1", "000017  1"."""
    for name in ("a", "b", "c"):
        voc.add(name)
    voc.add_split("car_train", "a -1\nb  1\nc  0\n")
    assert [record["image_id"] for record in read(voc, "car_train")] == ["a", "b", "c"]


def test_names_with_blanks(voc):
    voc.add("my image")
    voc.add("shot 1")
    voc.add_split("train", "my image\nshot 1\n")
    assert [record["image_id"] for record in read(voc, "train")] == ["my image", "shot 1"]


def test_windows_line_ends_and_bom(voc):
    voc.add("a")
    voc.add("b")
    path = voc.add_split("train", "")
    path.write_bytes(b"\xef\xbb\xbfa\r\nb\r\n")
    assert [record["image_id"] for record in read(voc, "train")] == ["a", "b"]


def test_missing_split_says_which_are_there(voc):
    voc.add("a")
    voc.add_split("val", "a\n")
    voc.add_split("car_val", "a 1\n")
    assert_fails(voc, "train.txt is missing", "Available splits: val.", split="train")


def test_empty_split(voc):
    voc.add("a")
    assert_fails(voc, voc.add_split("train", "\n \n"), "is empty", split="train")


def test_split_that_repeats_an_image(voc):
    voc.add("a")
    voc.add("b")
    path = voc.add_split("train", "a\nb\na\n")
    assert_fails(voc, f"{path}:3: lists a again, after line 1", split="train")


def test_no_voc_folder(voc, tmp_path):
    with pytest.raises(DataError, match="not a VOC folder: it has no Annotations/"):
        load_records(f"voc:{tmp_path}")
    assert_fails(voc, voc.path / "Annotations", "holds no annotation")


# Images


@pytest.mark.parametrize("file_name", ["a.JPG", "a.jpeg", "a.png", "a.PNG"])
def test_image_of_another_suffix(voc, file_name):
    voc.add_image(file_name)
    voc.add_xml("a")  # <filename> says a.jpg
    assert read_one(voc)["file_name"].endswith(f"JPEGImages/{file_name}")


@pytest.mark.parametrize("filename", [r"C:\data\my images\b.png", "/home/me/b.png", "b.png"])
def test_image_found_through_filename(voc, filename):
    voc.add_image("b.png")
    voc.add_xml("a", filename=filename)
    assert read_one(voc)["file_name"].endswith("JPEGImages/b.png")


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


@pytest.mark.parametrize("size", [(60, 41), (30, 20), (40, 60), ("nan", 40)])
def test_size_that_contradicts_the_image(voc, size):
    voc.add("a", size=size)
    assert_fails(voc, voc.xml("a"), voc.image("a"), "has 60x40", "delete")


def test_size_that_is_no_number(voc):
    voc.add("a", size=("wide", 40))
    assert_fails(voc, voc.xml("a"), "<size>", "wide")


@pytest.mark.parametrize("orientation", [None, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
def test_size_follows_the_rotation_that_detectron2_applies(voc, orientation):
    voc.add_image(exif_orientation=orientation)
    voc.add_xml("a", size=None)
    record = read_one(voc)
    assert read_image(record["file_name"]).shape[:2] == (record["height"], record["width"])


# Annotations and objects


def test_missing_xml(voc):
    voc.add_image("a.jpg")
    voc.add_split("train", "a\n")
    assert_fails(voc, voc.xml("a"), "missing: every listed image", split="train")


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


def test_another_xml(voc):
    voc.add("a")
    voc.xml("a").write_text("<annotations><image/></annotations>")
    assert_fails(voc, voc.xml("a"), "its root is <annotations>")


def test_unknown_class(voc):
    voc.add("a", [("car", "1 1 9 9"), ("cat", "1 1 9 9")])
    assert_fails(voc, f"{voc.xml('a')}: object 2 (cat)", "car, traffic light", "classes.txt")


def test_object_without_name(voc):
    voc.add("a", [("", "1 1 9 9")])
    assert_fails(voc, f"{voc.xml('a')}: object 1 (no name)")


@pytest.mark.parametrize(
    ("corners", "said"),
    [
        ("1 two 9 9", "<ymin> is 'two'"),
        ("1 2,5 9 9", "<ymin> is '2,5'"),
        ("1 1 9", "<ymax> is 'missing'"),
    ],
)
def test_coordinates_that_are_no_numbers(voc, corners, said):
    voc.add("a", [("car", "1 1 9 9"), ("car", corners)])
    assert_fails(voc, f"{voc.xml('a')}: object 2 (car)", said, "not a number")


def test_object_without_box(voc):
    voc.add("a", [("car", "1 1 9 9")])
    text = voc.xml("a").read_text()
    voc.xml("a").write_text(re.sub("<bndbox>.*</bndbox>", "", text))
    assert_fails(voc, f"{voc.xml('a')}: object 1 (car)", "no <bndbox>")


def test_difficult_that_is_neither_0_nor_1(voc):
    voc.add("a", [("car", "1 1 9 9", "yes")])
    assert_fails(voc, f"{voc.xml('a')}: object 1 (car)", "<difficult> is 'yes'")


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


@pytest.mark.parametrize("corners", BAD_BOXES)
def test_bad_box(voc, corners):
    voc.add("a", [("car", "1 1 9 9"), ("car", corners)])
    shown = "xmin {}, ymin {}, xmax {}, ymax {}".format(*corners.split())
    assert_fails(voc, f"{voc.xml('a')}: object 2 (car): box {shown} {BAD_BOXES[corners]}")


def test_bad_boxes_of_all_images_are_reported_together(voc):
    for name in ("a", "b"):
        voc.add(name, [("car", "30 1 2 9")])
    assert_fails(voc, "2 errors in", voc.xml("a"), voc.xml("b"), "DATASETS.SKIP_BAD_BOXES")


def test_bad_boxes_can_be_skipped(voc, caplog):
    voc.add("a", [("car", corners) for corners in ["1 1 9 9", *BAD_BOXES]])
    with caplog.at_level(logging.WARNING):
        record = read_one(voc, skip_bad_boxes=True)
    assert [x["bbox"] for x in record["annotations"]] == [[0, 0, 9, 9]]
    assert f"skipped {len(BAD_BOXES)} bad box(es)" in caplog.text


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
