"""Records of a function that is registered in Detectron2's catalog."""

import itertools

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from PIL import Image


@pytest.fixture
def register_records(tmp_path):
    """Register a record with objects of these categories, and further records as they are."""
    numbers = itertools.count()

    def register(categories, *others, names=("car", "dog"), **changes):
        Image.new("RGB", (60, 40)).save(tmp_path / "a.jpg")
        record = {"file_name": str(tmp_path / "a.jpg"), "image_id": 0, "width": 60, "height": 40}
        record["annotations"] = [
            {"bbox": [k, 1, 20, 20], "bbox_mode": BoxMode.XYXY_ABS, "category_id": category}
            for k, category in enumerate(categories)
        ]
        name = f"{tmp_path}_{next(numbers)}"
        DatasetCatalog.register(name, lambda: [{**record, **changes}, *others])
        if names:
            MetadataCatalog.get(name).thing_classes = list(names)
        return name

    return register
