"""Findings of readers and checks: each kind, its file and its line."""

import shutil
from pathlib import Path

import pandas as pd
import pytest
from detectron2.data.datasets.pascal_voc import register_pascal_voc
from PIL import Image

from fcos_d2.data import DataError, load_records
from fcos_d2.data.inspection.assignment import Assignment
from fcos_d2.data.inspection.checks import (
    check_boxes,
    check_classes,
    check_coverage,
    check_images,
    count_objects,
    describe_sizes,
)
from fcos_d2.data.inspection.listing import ADVICE, locate
from fcos_d2.data.sources import read_source

BOX = [10, 5, 20, 15]  # x, y, width, height
IMAGE = {"id": 7, "file_name": "a.jpg", "width": 60, "height": 40}


def annotation(**changes):
    return {"id": 1, "image_id": 7, "category_id": 3, "bbox": BOX, "iscrowd": 0, **changes}


def source_of(voc, split=None):
    return read_source(voc.source(split))


def findings_of(name):
    return locate(read_source(name).findings)


def line_of(path, text, number=1):
    """The line of the n-th occurrence of a text in a file, from 1."""
    lines = [k for k, line in enumerate(path.read_text().splitlines(), 1) if text in line]
    return lines[number - 1]


def everything(*sources):
    findings = [x for source in sources for x in (*source.findings, *check_boxes(source))]
    findings += check_images(sources) + check_classes(sources[:1], sources[1:], "ignore")
    return locate(findings)


def one(findings, kind):
    """The only finding of a kind."""
    (finding,) = [x for x in findings if x.kind == kind]
    return finding


# VOC folders


def test_clean_voc_folder(voc):
    voc.add("a", [("car", "11 6 30 20", 1), ("bus", "1 1 60 40"), ("car", "5 5 9 9")])
    voc.add("b", [("car", "3 3 9 9")], color="red")
    voc.add_split("train", "a\nb\n")
    source = source_of(voc, "train")
    assert source.records == load_records(source.name)
    assert source.class_names == ["bus", "car"]
    assert everything(source) == []


@pytest.fixture
def broken_voc(voc):
    """a: five bad objects; b: a wrong size; c: no image; d: broken XML; e: nothing at all."""
    (voc.path / "classes.txt").write_text("car\n")
    objects = [("car", "1 1 9 9"), ("cat", "1 1 9 9"), ("car", "9 9 1 1"), ("car", "1 two 9 9")]
    voc.add("a", [*objects, ("car", "70 1 80 9"), ("car", "2 2 9 9", "maybe")])
    voc.add("b", [("car", "1 1 9 9")], size=(30, 20))
    voc.add_xml("c", [("car", "nan 1 9 9")])
    voc.add("d")
    voc.xml("d").write_text("<annotation>\n<object>\n</annotation>\n")
    voc.add_split("train", "a\nb\nc\nd\na\ne\n")
    return voc


def test_all_problems_of_a_folder_with_their_lines(broken_voc):
    voc = broken_voc
    findings = findings_of(voc.source("train"))
    assert {x.severity for x in findings} == {"error"}
    a, b, c = voc.xml("a"), voc.xml("b"), voc.xml("c")
    split = voc.path / "ImageSets" / "Main" / "train.txt"
    expected = [
        (split, 5, "listed twice", "lists a again, after line 1"),
        (voc.xml("d"), 3, "bad file", "broken XML"),
        (voc.xml("e"), None, "bad file", "missing: every listed image needs an annotation"),
        (a, line_of(a, "<object>", 2), "bad object", "object 2 (cat): unknown class"),
        (a, line_of(a, "<object>", 3), "bad box", "is inverted"),
        (a, line_of(a, "<object>", 4), "bad object", "<ymin> is 'two', not a number"),
        (a, line_of(a, "<object>", 5), "bad box", "lies wholly outside the image of 60x40"),
        (a, line_of(a, "<object>", 6), "bad object", "<difficult> is 'maybe'"),
        (b, line_of(b, "<size>"), "bad file", "says 30x20"),
        (c, None, "bad file", "the image is missing"),
        (c, line_of(c, "<object>"), "bad box", "not finite"),
    ]
    for finding, (file, line, kind, said) in zip(findings, expected, strict=True):
        assert (finding.file, finding.line, finding.kind) == (str(file), line, kind)
        assert said in finding.message
        assert str(finding).count(str(file)) == 1


def test_training_stops_at_the_same_errors(broken_voc):
    name = broken_voc.source("train")
    with pytest.raises(DataError) as caught:
        load_records(name)
    errors = read_source(name).findings
    assert str(caught.value) == str(DataError.of(name, errors))
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{len(errors)} errors in {name}:"
    assert lines[1:11] == [f"  {x}" for x in errors[:10]]
    assert lines[11] == "  ... and 1 more: tools/check_dataset.py"
    assert "DATASETS.SKIP_BAD_BOXES True" in lines[12] and len(lines) == 13


def test_broken_xml_outside_the_split_is_found_once(voc):
    """All annotations are read for the class names."""
    voc.add("a", [("car", "1 1 9 9")])
    voc.add("b")
    voc.xml("b").write_text("<annotation>")
    voc.add_split("train", "a\n")
    for split in ("train", None):
        (finding,) = findings_of(voc.source(split))
        assert (finding.file, finding.line) == (str(voc.xml("b")), 1)
        with pytest.raises(DataError, match="b.xml:1: broken XML"):
            load_records(voc.source(split))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("voc:{}/nowhere:train", "is not there"),
        ("voc:{}:val", "val.txt is missing"),
        ("shapes:train", "shapes:SPLIT:COUNT"),
        ("yolo:x", "is not known. Name a source as"),
        ("coco:x.json:{}", "x.json is missing"),
    ],
)
def test_source_that_is_not_there(voc, name, said):
    voc.add("a", [("car", "1 1 9 9")])
    name = name.format(voc.path)
    (finding,) = findings_of(name)
    assert (finding.severity, finding.file, finding.kind) == ("error", name, "source")
    assert said in finding.message


def test_broken_json_has_its_line(make_coco):
    name = make_coco()
    json_file = name.split(":")[1]
    Path(json_file).write_text('{"images": [],\n "annotations": [,')
    (finding,) = findings_of(name)
    assert (finding.file, finding.line, finding.kind) == (json_file, 2, "source")


def test_boxes_from_0(voc):
    """xmin 0 is outside of VOC's pixels, which start at 1; that is not told twice."""
    voc.add("a", [("car", "0 5 9 9"), ("car", "5 0 9 9"), ("car", "1 1 9 9")])
    findings = everything(source_of(voc))
    assert [x.kind for x in findings] == ["box from 0"] * 2
    assert [x.line for x in findings] == [line_of(voc.xml("a"), "<object>", k) for k in (1, 2)]
    assert "xmin 0, ymin 5" in findings[0].message


def test_boxes_that_stick_out(voc):
    """The image has 60x40 pixels: 61 is one too far, -3 is read as 4 pixels before the first."""
    voc.add("a", [("car", "1 1 61 9"), ("car", "1 -3 9 9"), ("car", "1 1 60.4 40")])
    findings = everything(source_of(voc))
    assert [(x.severity, x.kind) for x in findings] == [("warning", "box sticks out")] * 2
    assert findings[0].message.endswith("image of 60x40 pixels by 1")
    assert findings[1].message.endswith("by 4")


def test_same_box_twice(voc):
    voc.add("a", [("car", "1 1 9 9"), ("bus", "2 2 9 9"), ("car", "1 1 9 9"), ("bus", "1 1 9 9")])
    same, other = everything(source_of(voc))
    assert (same.kind, same.line) == ("same box", line_of(voc.xml("a"), "<object>", 3))
    assert same.message == "object 3 (car) has the same box as object 1 (car)"
    assert other.message == "object 4 (bus) has the same box as object 1 (car), but another class"


# COCO files


def test_clean_coco_file(make_coco):
    """Category ids from 1 on, or with gaps, are what COCO has."""
    name = make_coco(
        images=[IMAGE, {"id": 2, "file_name": "b.jpg", "width": 50, "height": 30}],
        annotations=[annotation(), annotation(id=5, image_id=2, category_id=90)],
    )
    source = read_source(name)
    assert source.records == load_records(name)
    assert source.class_names == ["car", "zebra"]
    assert everything(source) == []


def test_all_problems_of_a_coco_file_with_their_lines(make_coco):
    name = make_coco(
        images=[IMAGE, {**IMAGE, "id": 8, "height": 0}, {**IMAGE, "id": 9, "file_name": "c.jpg"}],
        write_images=False,
        annotations=[
            annotation(),
            annotation(id=2, category_id=4),
            annotation(id=4, bbox=[1, 2, 3]),
            annotation(id=5, bbox=[1, 2, 0, 3]),
            annotation(id=5),
            {"id": 6},
        ],
    )
    json_file, folder = name.split(":")[1:]
    path = Path(json_file)
    Image.new("RGB", (60, 40)).save(f"{folder}/a.jpg")
    findings = findings_of(name)
    assert {(x.severity, x.file) for x in findings} == {("error", json_file)}
    # The line after the brace has the id.
    lines = path.read_text().splitlines()
    found = [(lines[x.line].strip(" ,"), x.message) for x in findings]
    box = "box [1, 2, 0, 3] is empty or inverted (width 0, height 3)"
    assert found == [
        ('"id": 8', "images[1] (id 8): height 0 must be a whole number above 0"),
        ('"id": 2', "annotations[1] (id 2): category_id 4 is not an id in 'categories'"),
        ('"id": 4', "annotations[2] (id 4): bbox [1, 2, 3] is not a list of 4 numbers"),
        ('"id": 5', "annotations[4] (id 5): the id is repeated"),
        ('"id": 6', "annotations[5] (id 6): it has no 'image_id'"),
        ('"id": 9', f"the image {folder}/c.jpg is missing"),
        ('"id": 5', f"annotations[3] (id 5, car): {box}"),
    ]


def test_wrong_size_and_crowds_of_coco(make_coco):
    """Two crowds of one box are fine; the size that the file states is not the image's."""
    crowd = {"iscrowd": 1, "bbox": [0, 0, 9, 9]}
    name = make_coco(annotations=[annotation(**crowd), annotation(id=2, **crowd)])
    path, folder = name.split(":")[1:]
    source = read_source(name)
    Image.new("RGB", (40, 60)).save(f"{folder}/a.jpg")
    findings = locate(check_boxes(source) + check_images([source]))
    finding = one(findings, "image size")
    assert len(findings) == 1 and finding.severity == "error"
    assert (finding.file, finding.line) == (path, line_of(Path(path), "{", 2))
    assert "a.jpg does not have the stated size of 60x40 pixels" in finding.message


def test_ids_that_may_count_from_1(register_records, tmp_path):
    """Where the last class has no object, no id is out of range."""
    source = read_source(register_records([1, 1]))
    finding = one(everything(source), "class without objects")
    said = "no object of 'car' to train on: if the ids of your records count from 1, subtract 1"
    assert finding.message == said
    assert everything(read_source(register_records([0, 1]))) == []


# Images


def test_images_that_do_not_open(voc):
    """A JPEG that was cut off opens, has a size, and fails when it is decoded."""
    for name in ("a", "b"):
        voc.add(name, [("car", "1 1 9 9")])
    path = voc.image("a")
    Image.effect_noise((60, 40), 50).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[:-500])
    source = source_of(voc)
    assert source.findings == [] and len(source.records) == 2
    (finding,) = locate(check_images([source]))
    assert (finding.severity, finding.file, finding.kind) == ("error", str(path), "bad image")
    assert "truncated" in finding.message


def test_same_picture_in_one_source_and_in_two(make_voc):
    train, val = make_voc("train"), make_voc("val")
    for folder, names in ((train, "abc"), (val, "xy")):
        for name in names:
            color = {"a": "red", "b": "red", "c": "blue", "x": "blue", "y": "green"}[name]
            folder.add(name, [("car", "1 1 9 9")], color)
    sources = [source_of(train), source_of(val)]
    same, leak = locate(check_images(sources))
    assert (same.severity, same.kind, same.file) == (
        "warning",
        "same picture",
        f"{train.image('b')}",
    )
    assert same.message == f"the same picture as {train.image('a')}"
    assert (leak.severity, leak.kind) == ("warning", "same picture in two sources")
    assert leak.file == str(val.image("x"))
    assert f"the same picture as {train.image('c')} of voc:{train.path}" in leak.message


def test_same_file_under_two_ids(make_coco):
    name = make_coco(images=[IMAGE, {**IMAGE, "id": 8}], annotations=[annotation()])
    (finding,) = locate(check_images([read_source(name)]))
    assert finding.kind == "listed twice"
    assert "the image ids 7 and 8 share this file" in finding.message


# Classes


def test_classes_that_differ(make_voc):
    train, val = make_voc("train"), make_voc("val")
    train.add("a", [("car", "1 1 9 9"), ("bus", "2 2 9 9")])
    val.add("b", [("car", "1 1 9 9"), ("cat", "2 2 9 9"), ("dog", "3 3 9 9")])
    finding = one(everything(source_of(train), source_of(val)), "classes")
    assert (finding.severity, finding.file) == ("error", f"voc:{val.path}")
    assert finding.message == (
        f"3 classes, but voc:{train.path} has 2; missing here: bus; only here: cat, dog"
    )
    for folder, names in ((train, "car\nbus\n"), (val, "bus\ncar\n")):
        (folder.path / "classes.txt").write_text(names)
    findings = locate(check_classes([source_of(train)], [source_of(val)], "ignore"))
    assert one(findings, "classes").message == f"the classes of voc:{train.path} in another order"


def test_classes_without_objects_to_train_on(make_voc):
    """bus: only difficult ones; cat: none here, two in val; "bg" is none at all."""
    train, val = make_voc("train"), make_voc("val")
    train.add("a", [("car", "1 1 9 9"), ("bus", "2 2 9 9", 1)])
    val.add("b", [("cat", "1 1 9 9"), ("cat", "2 2 9 9")])
    for folder in (train, val):
        (folder.path / "classes.txt").write_text("car\nbus\ncat\nbackground\n")
    findings = locate(check_classes([source_of(train)], [source_of(val)], "ignore"))
    assert {x.severity for x in findings} == {"warning"}
    messages = [x.message for x in findings if x.kind == "class without objects"]
    assert messages == [
        "no object of 'bus' to train on",
        "no object of 'cat' to train on, but 2 to test on",
        "no object of 'background' to train on",
    ]
    assert "'background' is probably not an object" in one(findings, "background class").message


def test_nothing_but_difficult_objects_is_an_error(voc):
    voc.add("a", [("car", "1 1 9 9", 1), ("dog", "1 1 9 9", 1)])
    finding = one(locate(check_classes([source_of(voc)], [], "ignore")), "no objects")
    assert finding.severity == "error"
    assert finding.message == "no object to train on: all 2 are difficult or crowds"


def test_class_name_twice(make_coco):
    categories = [{"id": 3, "name": "car"}, {"id": 4, "name": "car"}]
    name = make_coco(annotations=[annotation()], categories=categories)
    findings = locate(check_classes([read_source(name)], [], "ignore"))
    assert one(findings, "class name twice").message == "2 classes are called 'car'"


def test_rare_classes(voc):
    """201 cars for one bus and one of 3 dogs: a hundredth of 201 is 2.01, so a bus is rare."""
    box = "1 1 9 9"
    voc.add("a", [("car", box)] * 201 + [("bus", box)] + [("dog", box)] * 3)
    findings = locate(check_classes([source_of(voc)], [], "ignore"))
    assert [x.kind for x in findings] == ["rare classes"]
    assert findings[0].message == "car has 201 objects, but bus 1"


def test_images_without_objects(voc):
    voc.add("a", [("car", "1 1 9 9")])
    voc.add("b")
    voc.add("c")
    finding = one(everything(source_of(voc)), "images without objects")
    assert finding.severity == "warning"
    assert finding.message.startswith("2 of 3 images have no object, the first is ")
    assert finding.message.endswith("b.jpg")
    (voc.path / "classes.txt").write_text("car\n")
    voc.add_split("val", "b\nc\n")
    findings = locate(check_classes([source_of(voc, "val")], [], "ignore"))
    assert one(findings, "images without objects").severity == "error"
    voc.add_split("train", "a\n")
    train = [source_of(voc, split) for split in ("train", "val")]
    findings = locate(check_classes(train, [], "ignore"))  # background images beside others
    assert one(findings, "images without objects").severity == "warning"


# Coverage, tables, text


def test_coverage(voc):
    """Four objects: fine, below the stride of 8, without a location, and without one of its own.

    Of the cars 1 of 3, 33.3 %, have none of these; of the buses all, so that small is 2 of 4.
    """
    voc.add("a", [("car", "1 1 9 9"), ("bus", "2 2 9 5"), ("car", "3 3 5 5"), ("car", "1 1 9 8")])
    source = source_of(voc)
    objects = pd.DataFrame(
        {
            "image_id": "a",
            "index": [0, 1, 2, 3],
            "category_id": [1, 0, 1, 1],
            "size": "small",
            "scaled_width": [16.0, 16, 4, 16],
            "scaled_height": [16.0, 7, 4, 16],
            "positives": [4, 2, 0, 0],
            "candidates": [4, 2, 0, 4],
            "expected_level": "p3",
        }
    )
    levels = pd.DataFrame({"stride": [8, 16]}, index=["p3", "p4"])
    assignment = Assignment(objects, levels, 0, 6, "")
    findings = locate(check_coverage(source, assignment))
    assert {x.severity for x in findings} == {"warning"}
    assert [(x.kind, x.line) for x in findings[:3]] == [
        ("below the finest stride", line_of(voc.xml("a"), "<object>", 2)),
        ("no training location", line_of(voc.xml("a"), "<object>", 3)),
        ("no location of its own", line_of(voc.xml("a"), "<object>", 4)),
    ]
    assert "object 2 (bus): 16.0x7.0 px in the network's input, 2 locations" in findings[0].message
    assert "4.0x4.0 px in the network's input, locations 8 apart on p3" in findings[1].message
    assert "its 4 locations are inside smaller boxes" in findings[2].message
    assert [x.message for x in findings[3:]] == [
        "size small: 50.0 % of 4 objects have a training location",
        "class car: 33.3 % of 3 objects have a training location",
    ]
    assert all(ADVICE[x.kind] for x in findings)
    few = assignment._replace(objects=objects[2:])
    finding = locate(check_coverage(source, few))[-1]
    assert (finding.severity, finding.kind) == ("error", "coverage")
    assert finding.message == "none of 2 objects has a training location"


def test_tables_by_hand(voc):
    """Boxes 1..10 and 1..20 wide are 10 and 20 pixels: median 15; 8 and 4 high: median 6."""
    voc.add("a", [("car", "1 1 10 8"), ("car", "1 1 20 4", 1)])
    voc.add("b", [("bus", "11 1 60 40")], image_size=(120, 40))
    source = source_of(voc)
    table = count_objects(source)
    assert table.index.tolist() == ["bus", "car"]
    assert table.loc["car"].tolist() == [2, 1, 1, 0, 15, 6]
    assert table.loc["bus"].tolist() == [1, 1, 0, 0, 50, 40]
    table = describe_sizes(source)
    assert table.loc["image width"].tolist() == pytest.approx([60, 63, 90, 117, 120])
    assert table.loc["box width / height", "largest"] == 5
    assert table.loc["box height", "median"] == 8


def test_voc_names_of_detectron2_are_read_as_folders(make_voc, tmp_path):
    voc = make_voc("VOC2007")
    voc.add("a", [("car", "9 9 1 1", 1)])
    voc.add_split("trainval", "a\n")
    name = f"{tmp_path}_voc_2007_trainval"
    register_pascal_voc(name, str(voc.path), "trainval", 2007)
    (finding,) = findings_of(name)
    assert (finding.kind, finding.line) == ("bad box", line_of(voc.xml("a"), "<object>"))
    shutil.rmtree(voc.path / "Annotations")
    assert "has no Annotations/" in findings_of(name)[0].message
