"""Sources by name: what is registered, read, checked and refused."""

import json
import logging
import math
import os

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json, register_coco_instances
from detectron2.data.datasets.pascal_voc import CLASS_NAMES, register_pascal_voc
from detectron2.structures import BoxMode
from PIL import Image

from fcos_d2.data import DataError, class_names, load_records, register_source

BOX = [10, 5, 20, 15]  # x, y, width, height


def annotation(**changes):
    return {
        "id": 1,
        "image_id": 7,
        "category_id": 3,
        "bbox": BOX,
        "area": 300,
        "iscrowd": 0,
        **changes,
    }


# VOC folders


def test_voc_source(make_voc):
    voc = make_voc("VOC2012")
    voc.add("a", [("car", "11 6 30 20", 1)])
    voc.add("b")
    voc.add_split("train", "a\n")
    name = f"voc:{voc.path}:train"
    metadata = register_source(name)
    assert metadata is MetadataCatalog.get(name)
    assert class_names(name) == list(CLASS_NAMES) == metadata.thing_classes
    assert (metadata.evaluator_type, metadata.year) == ("pascal_voc", 2012)
    assert (metadata.dirname, metadata.split) == (str(voc.path), "train")
    (record,) = load_records(name)
    assert record["annotations"][0]["bbox"] == [10, 5, 30, 20]
    assert record["annotations"][0]["difficult"] == 1
    assert DatasetCatalog.get(name) == [record]


def test_voc_source_without_split_takes_every_annotation(voc):
    voc.add("b", [("car", "1 1 9 9")])
    voc.add("a")
    name = f"voc:{voc.path}"
    assert register_source(name).split is None
    assert [record["image_id"] for record in load_records(name)] == ["a", "b"]


@pytest.mark.parametrize("prefix", ["", "./", "~/"])
@pytest.mark.parametrize("suffix", ["", "/"])
def test_forms_of_the_path(make_voc, tmp_path, monkeypatch, prefix, suffix):
    voc = make_voc("VOC2007")
    voc.add("a", [("car", "1 1 9 9")])
    voc.add_split("train", "a\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    name = f"voc:{prefix}../{tmp_path.name}/VOC2007{suffix}:train"
    assert len(register_source(name).thing_classes) == 20
    assert load_records(name)[0]["file_name"] == str(voc.path / "JPEGImages" / "a.jpg")


def test_voc_folder_as_working_folder(make_voc, tmp_path, monkeypatch):
    """The folder's name decides about the class names, so "." has to be looked up."""
    voc = make_voc("VOC2012")
    voc.add("a", [("car", "1 1 9 9")])
    voc.add_split(tmp_path.name, "a\n")
    monkeypatch.chdir(voc.path)
    metadata = register_source(f"voc:.:{tmp_path.name}")
    assert (len(metadata.thing_classes), metadata.year) == (20, 2012)


def test_missing_folder(tmp_path):
    with pytest.raises(DataError, match="the folder .*/nowhere is not there"):
        register_source(f"voc:{tmp_path}/nowhere:train")
    assert f"voc:{tmp_path}/nowhere:train" not in DatasetCatalog.list()


def test_second_registration_does_nothing(voc):
    voc.add("a", [("car", "1 1 9 9")])
    name = f"voc:{voc.path}"
    metadata = register_source(name)
    records = load_records(name)
    voc.add("b", [("bus", "1 1 9 9")])
    assert register_source(name) is metadata
    assert class_names(name) == ["car"]
    assert load_records(name) is records  # read once


def test_source_can_be_registered_again_after_an_error(voc):
    name = f"voc:{voc.path}"
    with pytest.raises(DataError, match="names no class"):
        register_source(name)
    voc.add("a", [("car", "1 1 9 9")])
    assert register_source(name).thing_classes == ["car"]


def test_bad_boxes_can_be_skipped_after_the_error(voc, caplog):
    """As in a notebook: the error says what to set, and setting it helps."""
    voc.add("a", [("car", "1 1 9 9"), ("car", "9 9 1 1")])
    name = f"voc:{voc.path}"
    register_source(name)
    with pytest.raises(DataError, match="DATASETS.SKIP_BAD_BOXES"):
        load_records(name)
    register_source(name, skip_bad_boxes=True)
    register_source(name)  # by one who does not mind
    with caplog.at_level(logging.WARNING):
        (record,) = load_records(name)
    assert len(record["annotations"]) == 1
    assert "left out 1 bad box(es)" in caplog.text


@pytest.mark.parametrize("evaluator", [{"evaluator_type": "pascal_voc"}, {}])
def test_voc_names_of_detectron2_keep_difficult(make_voc, tmp_path, evaluator):
    voc = make_voc("VOC2007")
    voc.add("a", [("car", "1 1 9 9", 1), ("dog", "1 1 9 9", 0)])
    voc.add("b")
    voc.add_split("trainval", "a\nb\n")
    name = f"{tmp_path}_voc_2007_trainval"
    register_pascal_voc(name, str(voc.path), "trainval", 2007)
    MetadataCatalog.get(name).set(**evaluator)
    theirs = DatasetCatalog.get(name)
    assert "difficult" not in theirs[0]["annotations"][0]
    assert register_source(name).thing_classes == list(CLASS_NAMES)
    record, _ = load_records(name)
    assert [x["difficult"] for x in record["annotations"]] == [1, 0]
    assert [x["bbox"] for x in record["annotations"]] == [
        x["bbox"] for x in theirs[0]["annotations"]
    ]


# COCO files


def test_coco_source(make_coco):
    """Category ids 3 and 90 become 0 and 1; the crowd stays; difficult is VOC's alone."""
    name = make_coco(
        annotations=[annotation(), annotation(id=2, category_id=90, iscrowd=1, bbox=[1, 2, 3, 4])]
    )
    metadata = register_source(name)
    json_file, image_root = name.split(":")[1:]
    assert metadata.thing_classes == ["car", "zebra"]
    assert (metadata.json_file, metadata.image_root) == (json_file, image_root)
    assert metadata.evaluator_type == "coco"
    (record,) = load_records(name)
    assert record == load_coco_json(json_file, image_root, name)[0]
    assert (record["image_id"], record["width"], record["height"]) == (7, 60, 40)
    assert record["annotations"] == [
        {"iscrowd": 0, "bbox": BOX, "category_id": 0, "bbox_mode": BoxMode.XYWH_ABS},
        {"iscrowd": 1, "bbox": [1, 2, 3, 4], "category_id": 1, "bbox_mode": BoxMode.XYWH_ABS},
    ]
    assert metadata.thing_dataset_id_to_contiguous_id == {3: 0, 90: 1}


def test_coco_sizes_as_decimals_become_whole(make_coco):
    """640.0 is a whole number in JSON; training makes an array of that size."""
    name = make_coco(images=[{**IMAGE, "width": 60.0, "height": 40.0}], write_images=False)
    Image.new("RGB", (60, 40)).save(f"{name.split(':')[2]}/a.jpg")
    register_source(name)
    (record,) = load_records(name)
    sizes = (record["width"], record["height"])
    assert sizes == (60, 40)
    assert [type(x) for x in sizes] == [int, int]


def test_coco_image_without_objects(make_coco):
    name = make_coco()
    register_source(name)
    assert load_records(name)[0]["annotations"] == []


@pytest.mark.parametrize(
    ("box", "reason"),
    [([10, 5, 0, 15], "is empty"), ([60, 5, 9, 9], "outside"), ([1, 1, -3, 9], "inverted")],
)
def test_coco_bad_box(make_coco, caplog, box, reason):
    name = make_coco(annotations=[annotation(), annotation(id=2, bbox=box)])
    register_source(name)
    with pytest.raises(DataError, match=rf"a\.jpg, object 2 \(car\): box .* {reason}"):
        load_records(name)
    register_source(name, skip_bad_boxes=True)
    (record,) = load_records(name)
    assert [x["bbox"] for x in record["annotations"]] == [BOX]
    assert "left out 1 bad box(es)" in caplog.text


IMAGE = {"id": 7, "file_name": "a.jpg", "width": 60, "height": 40}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"annotations": [annotation(category_id=4)]}, "annotation 1 has the category_id 4"),
        ({"annotations": [annotation(image_id=8)]}, "annotation 1 has the image_id 8"),
        ({"annotations": [annotation(bbox=[])]}, r"annotation 1 has the bbox \[\]"),
        ({"annotations": [annotation(bbox=[1, 2, None, 4])]}, "not a list of 4 numbers"),
        ({"annotations": [annotation(), annotation()]}, "annotations repeats the id 1"),
        ({"annotations": [annotation(ignore=1)]}, "annotation 1 has 'ignore'"),
        (
            {"annotations": [annotation(iscrowd="0")]},
            "has the iscrowd .0.: it has to be 0 or 1",
        ),
        ({"annotations": [annotation(segmentation=[[]])]}, "without a polygon of 3 points"),
        ({"annotations": [annotation(segmentation=[[1, 2, 3, 4]])]}, "without a polygon"),
        ({"annotations": [{"id": 1}]}, r"annotations\[0\] has no 'image_id'"),
        ({"images": [IMAGE, IMAGE]}, "images repeats the id 7"),
        ({"images": [IMAGE, {"id": 8}], "write_images": False}, r"images\[1\] has no 'file_name'"),
        ({"categories": [{"id": 1}]}, r"categories\[0\] has no 'name'"),
        ({"categories": []}, "'categories' is empty"),
        (
            {"categories": [{"id": 1, "name": "car"}, {"id": "2", "name": "dog"}]},
            r"categories\[1\] has the id '2': ids are all numbers or all texts",
        ),
        (
            {"categories": [{"id": [1], "name": "car"}]},
            r"categories\[0\] has the id \[1\], which is",
        ),
        (
            {"images": [{**IMAGE, "width": 60.5}], "write_images": False},
            "image 7 has the width 60.5: it has to be a whole number",
        ),
        (
            {"images": [{**IMAGE, "height": math.inf}], "write_images": False},
            "image 7 has the height inf: it has to be a whole",
        ),
        (
            {"annotations": [annotation(category_id=[3])]},
            r"has the category_id \[3\], which is not",
        ),
        ({"annotations": [annotation(segmentation=[5, 5, 6, 6, 7, 7])]}, "is no list of lists"),
    ],
)
def test_coco_file_with_a_fault(make_coco, content, said):
    name = make_coco(**content)
    with pytest.raises(DataError, match=rf"annotations\.json.*{said}"):
        register_source(name)
    assert name not in DatasetCatalog.list()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"images": [', "is broken JSON"),
        ("[]", "has no list 'images'"),
        (json.dumps({"images": [], "annotations": {}}), "has no list 'annotations'"),
    ],
)
def test_coco_file_of_another_kind(make_coco, text, said):
    name = make_coco()
    json_file = name.split(":")[1]
    with open(json_file, "w") as file:
        file.write(text)
    with pytest.raises(DataError, match=f"{json_file} {said}"):
        register_source(name)


def test_coco_file_missing(make_coco):
    name = make_coco()
    os.remove(name.split(":")[1])
    with pytest.raises(DataError, match=r"annotations\.json can't be read \(No such file"):
        register_source(name)


def test_coco_image_missing(make_coco):
    name = make_coco(annotations=[annotation()], write_images=False)
    register_source(name)
    with pytest.raises(DataError, match=r"the image .*images/a\.jpg is missing"):
        load_records(name)


def test_coco_folder_missing(make_coco):
    with pytest.raises(DataError, match="the image folder .*nowhere is not there"):
        register_source(make_coco() + "/nowhere")


# Other names


@pytest.mark.parametrize(
    "name", ["voc_2008_trainval", "voc", "voc:", "VOC2007", "yolo:a:b", "", "shapes"]
)
def test_unknown_name_lists_the_forms(name):
    with pytest.raises(DataError, match="is not known. Name a source as 'voc:PATH:SPLIT'") as error:
        register_source(name)
    assert isinstance(error.value, ValueError)
    assert repr(name) in str(error.value)
    assert all(form in str(error.value) for form in ("coco:", "shapes:SPLIT:COUNT"))
    assert name not in DatasetCatalog.list()


@pytest.mark.parametrize("name", ["shapes:train", "shapes:train:0", "shapes:../x:5", "shapes::5"])
def test_misspelt_shapes(name):
    with pytest.raises(DataError, match="shapes:SPLIT:COUNT"):
        register_source(name)


def test_coco_without_folder(tmp_path):
    with pytest.raises(DataError, match="coco:ANNOTATIONS.json:IMAGE_FOLDER"):
        register_source("coco:annotations.json")


def one_record(tmp_path, category):
    image = tmp_path / "a.jpg"
    image.touch()
    box = {"bbox": [1, 1, 9, 9], "bbox_mode": BoxMode.XYXY_ABS, "category_id": category}
    return [{"file_name": str(image), "width": 60, "height": 40, "annotations": [box]}]


def test_own_registration_is_used_and_checked(tmp_path):
    name = f"{tmp_path}_own"
    DatasetCatalog.register(name, lambda: one_record(tmp_path, category=1))
    with pytest.raises(DataError, match="has no class names: set MetadataCatalog"):
        register_source(name)
    MetadataCatalog.get(name).thing_classes = ["car"]
    assert register_source(name).thing_classes == ["car"]
    with pytest.raises(DataError, match=r"a\.jpg, object 1: category id 1, but the 1 classes"):
        load_records(name)


def test_own_record_without_a_size(tmp_path):
    (record,) = one_record(tmp_path, category=0)
    del record["height"]
    name = f"{tmp_path}_own"
    DatasetCatalog.register(name, lambda: [record])
    MetadataCatalog.get(name).thing_classes = ["car"]
    register_source(name)
    with pytest.raises(DataError, match="_own: record 0 has no 'height'"):
        load_records(name)


def test_missing_file_of_a_name_that_detectron2_knows():
    name = "a_json_that_is_gone"
    register_coco_instances(name, {}, "gone/a.json", "gone")
    MetadataCatalog.get(name).thing_classes = ["car"]
    with pytest.raises(DataError, match=r"gone/a\.json is missing. \$DETECTRON2_DATASETS is"):
        load_records(name)
