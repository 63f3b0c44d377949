"""Records of a function of the user: registered, read and checked."""

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from fcos_d2.data import DataError, load_records, register_source
from fcos_d2.data.sources import read_source


def messages_of(name):
    return [str(x) for x in read_source(name).findings]


def test_records_are_taken_as_they_are(register_records, tmp_path):
    name = register_records([0, 1], {"file_name": str(tmp_path / "a.jpg"), "width": 6, "height": 4})
    first, second = load_records(name)
    assert first == DatasetCatalog.get(name)[0]
    assert (second["image_id"], second["annotations"]) == (1, [])


def test_class_names_are_needed(register_records):
    name = register_records([0], names=None)
    with pytest.raises(DataError, match="has no class names: set MetadataCatalog"):
        register_source(name)
    MetadataCatalog.get(name).thing_classes = ["car"]
    assert register_source(name).thing_classes == ["car"]


def test_ids_that_count_from_1(register_records):
    """Two classes have the ids 0 and 1; who counts from 1 writes 1 and 2."""
    name = register_records([1, 2, 1])
    with pytest.raises(DataError, match="2 errors in"):
        load_records(name)
    first, second = messages_of(name)
    assert first.endswith("a.jpg: object 2: category id 2, but the 2 classes have the ids 0 to 1")
    assert second.startswith(f"{name}: no object has the category id 0, but some have 2")
    assert second.endswith("Subtract 1 in the function that makes the records.")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"category_id": None}, "object 1: category id None, but the 2 classes"),
        ({"bbox_mode": None}, "object 1: bbox [0, 1, 20, 20] is not in its bbox_mode"),
        ({"bbox": [1, 1, 20]}, "object 1: bbox [1, 1, 20] is not in its bbox_mode"),
        ({"bbox": [5, 5, 5, 9]}, "object 1 (car): box [5.0, 5.0, 5.0, 9.0] is empty or inverted"),
    ],
)
def test_object_with_a_fault(register_records, change, said):
    thing = {"bbox": [0, 1, 20, 20], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0, **change}
    name = register_records([0], annotations=[thing])
    assert said in messages_of(name)[0]
    with pytest.raises(DataError):
        load_records(name)


def test_records_with_a_fault(register_records):
    other = {"file_name": "gone.jpg", "width": 6, "height": 4}
    name = register_records([], {"file_name": "x"}, other, annotations=[{"bbox": [1, 1, 9, 9]}])
    first, *others = messages_of(name)
    assert "a.jpg: object 1 has no 'bbox_mode'" in first
    assert others == [f"{name}: record 1 has no 'height'", "gone.jpg: the image is missing"]
