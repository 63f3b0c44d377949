"""COCO files: records as Detectron2's, and an error that names file and item for each fault."""

import json
import math
import os
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json, register_coco_instances
from detectron2.structures import BoxMode
from PIL import Image

from fcos_d2.data import DataError, load_records, register_source

BOX = [10, 5, 20, 15]  # x, y, width, height
IMAGE = {"id": 7, "file_name": "a.jpg", "width": 60, "height": 40}
CAR = {"id": 3, "name": "car"}


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


def test_source(make_coco):
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


def test_sizes_as_decimals_become_whole(make_coco):
    """640.0 is a whole number in JSON; training makes an array of that size."""
    name = make_coco(images=[{**IMAGE, "width": 60.0, "height": 40.0}], write_images=False)
    Image.new("RGB", (60, 40)).save(f"{name.split(':')[2]}/a.jpg")
    (record,) = load_records(name)
    sizes = (record["width"], record["height"])
    assert sizes == (60, 40)
    assert [type(x) for x in sizes] == [int, int]


def test_image_without_objects(make_coco):
    assert load_records(make_coco())[0]["annotations"] == []


@pytest.mark.parametrize(
    ("box", "reason"),
    [([10, 5, 0, 15], "is empty"), ([60, 5, 9, 9], "outside"), ([1, 1, -3, 9], "inverted")],
)
def test_bad_box(make_coco, caplog, box, reason):
    name = make_coco(annotations=[annotation(), annotation(id=2, bbox=box)])
    with pytest.raises(DataError, match=rf"annotations\[1\] \(id 2, car\): box .* {reason}"):
        load_records(name)
    (record,) = load_records(name, skip_bad_boxes=True)
    assert [x["bbox"] for x in record["annotations"]] == [BOX]
    assert "skipped 1 bad box(es)" in caplog.text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"annotations": [annotation(category_id=4)]}, r"annotations\[0\] \(id 1\): category_id 4"),
        ({"annotations": [annotation(image_id=8)]}, "image_id 8 is not an id in 'images'"),
        ({"annotations": [annotation(category_id=[3])]}, r"category_id \[3\] is not an id"),
        ({"annotations": [annotation(bbox=[])]}, r"bbox \[\] is not a list of 4 numbers"),
        ({"annotations": [annotation(bbox=[1, 2, None, 4])]}, "is not a list of 4 numbers"),
        (
            {"annotations": [annotation(), annotation()]},
            r"\[1\] \(id 1\): the id is repeated",
        ),
        ({"annotations": [annotation(ignore=1)]}, "'ignore' is not supported"),
        ({"annotations": [annotation(iscrowd="0")]}, "iscrowd '0' must be 0 or 1"),
        ({"annotations": [{"id": 1}]}, r"annotations\[0\] \(id 1\): it has no 'image_id'"),
        ({"images": [IMAGE, IMAGE]}, r"images\[1\] \(id 7\): the id is repeated"),
        ({"images": [IMAGE, {"id": 8}], "write_images": False}, "it has no 'file_name'"),
        (
            {"images": [{**IMAGE, "width": 60.5}], "write_images": False},
            "width 60.5 must be",
        ),
        ({"images": [{**IMAGE, "height": math.inf}], "write_images": False}, "height inf must be"),
        ({"categories": [CAR, {"id": 1}]}, r"categories\[1\] \(id 1\): it has no 'name'"),
        ({"categories": [CAR, {"id": "2", "name": "dog"}]}, "ids must be all numbers or all str"),
        ({"categories": [CAR, {"id": [1], "name": "dog"}]}, "the id is neither a number nor a str"),
        ({"categories": []}, "'categories' is empty"),
    ],
)
def test_file_with_a_fault(make_coco, content, said):
    with pytest.raises(DataError, match=rf"annotations\.json.*{said}"):
        load_records(make_coco(**content))


def test_outlines_are_not_read(make_coco):
    """Detectron2 drops an object whose outline has no 3 points; boxes do not depend on outlines."""
    objects = [
        annotation(id=k, segmentation=x) for k, x in enumerate([[[]], [5, 5, 6, 6], [[1, 2]]])
    ]
    (record,) = load_records(make_coco(annotations=objects))
    assert [x["bbox"] for x in record["annotations"]] == [BOX] * 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"images": [', "is broken JSON"),
        ("[]", "has no list 'categories'"),
        (json.dumps({"categories": [], "images": []}), "has no list 'annotations'"),
    ],
)
def test_file_of_another_kind(make_coco, text, said):
    name = make_coco()
    json_file = name.split(":")[1]
    Path(json_file).write_text(text)
    with pytest.raises(DataError, match=f"{json_file} {said}"):
        register_source(name)


def test_missing_file_image_and_folder(make_coco):
    name = make_coco(annotations=[annotation()], write_images=False)
    with pytest.raises(DataError, match=r"the image .*images/a\.jpg is missing"):
        load_records(name)
    os.remove(name.split(":")[1])
    with pytest.raises(DataError, match=r"annotations\.json is missing"):
        register_source(name)
    with pytest.raises(DataError, match="the image folder .*nowhere is not there"):
        register_source(make_coco() + "/nowhere")
    with pytest.raises(DataError, match="coco:ANNOTATIONS.json:IMAGE_FOLDER"):
        register_source("coco:annotations.json")


# Names that Detectron2 knows


def test_names_of_detectron2_are_read_by_this_reader(make_coco, tmp_path):
    """Class names are registered when the file is read, as Detectron2's loader does."""
    json_file, image_root = make_coco(annotations=[annotation()]).split(":")[1:]
    name = f"{tmp_path}_coco"
    register_coco_instances(name, {}, json_file, image_root)
    (record,) = load_records(name)
    assert record == load_coco_json(json_file, image_root)[0] | {
        "annotations": record["annotations"]
    }
    metadata = MetadataCatalog.get(name)
    assert metadata.thing_classes == ["car", "zebra"]
    assert metadata.thing_dataset_id_to_contiguous_id == {3: 0, 90: 1}
    assert DatasetCatalog.get(name) == [record]


def test_categories_that_are_not_the_registered_classes(make_coco, tmp_path):
    json_file, image_root = make_coco().split(":")[1:]
    name = f"{tmp_path}_coco"
    register_coco_instances(name, {}, json_file, image_root)
    MetadataCatalog.get(name).thing_classes = ["car"]
    with pytest.raises(
        DataError, match=r"annotations\.json are car, zebra, but the registered .* car:"
    ):
        load_records(name)


def test_missing_file_of_a_name_that_detectron2_knows():
    name = "a_json_that_is_gone"
    register_coco_instances(name, {}, "gone/a.json", "gone")
    MetadataCatalog.get(name).thing_classes = ["car"]
    with pytest.raises(DataError, match=r"gone/a\.json is missing. \$DETECTRON2_DATASETS is"):
        load_records(name)
