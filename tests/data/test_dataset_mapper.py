"""`DetectionDatasetMapper`: boxes follow the image, ignored objects are marked."""

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from PIL import Image

from fcos_d2.data.dataset_mapper import DetectionDatasetMapper


@pytest.fixture
def record(tmp_path):
    """A 40 x 20 image with a red dot at (30, 5), an object, a difficult one and a crowd."""
    image = np.zeros((20, 40, 3), dtype=np.uint8)
    image[5, 30] = (255, 0, 0)
    Image.fromarray(image).save(tmp_path / "a.png")
    boxes = [
        ([28, 4, 33, 8], {}),
        ([0, 0, 10, 10], {"difficult": 1}),
        ([5, 5, 9, 9], {"iscrowd": 1}),
    ]
    return {
        "file_name": str(tmp_path / "a.png"),
        "image_id": "a",
        "height": 20,
        "width": 40,
        "annotations": [
            {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": k, **flags}
            for k, (box, flags) in enumerate(boxes)
        ],
    }


def test_flip_by_hand(record):
    """The width is 40: x0, x1 = 28, 33 become 40 - 33, 40 - 28; the dot goes to 39 - 30 = 9."""
    mapper = DetectionDatasetMapper(augmentations=[T.RandomFlip(prob=1.0)], image_format="RGB")
    result = mapper(record)
    assert result["instances"].gt_boxes.tensor[0].tolist() == [7, 4, 12, 8]
    assert result["image"].shape == (3, 20, 40)
    assert result["image"][:, 5, 9].tolist() == [255, 0, 0]
    assert "annotations" not in result and "annotations" in record


def test_bgr(record):
    result = DetectionDatasetMapper(augmentations=[], image_format="BGR")(record)
    assert result["image"][:, 5, 30].tolist() == [0, 0, 255]


@pytest.mark.parametrize(
    "difficult, crowd, classes, ignored",
    [
        ("ignore", "ignore", [0, 1, 2], [False, True, True]),
        ("train", "ignore", [0, 1, 2], [False, False, True]),
        ("drop", "ignore", [0, 2], [False, True]),
        ("ignore", "drop", [0, 1], [False, True]),
    ],
)
def test_what_becomes_of_difficult_and_crowd(record, difficult, crowd, classes, ignored):
    mapper = DetectionDatasetMapper(augmentations=[], difficult=difficult, crowd=crowd)
    instances = mapper(record)["instances"]
    assert instances.gt_classes.tolist() == classes
    assert instances.gt_ignore.tolist() == ignored


def test_boxes_of_integers_keep_their_fractions(record):
    """40 x 20 to 32 x 16, so times 0.8: x 28, 33 and y 4, 8 become 22.4, 26.4 and 3.2, 6.4."""
    resize = T.ResizeTransform(20, 40, 16, 32)
    boxes = DetectionDatasetMapper(augmentations=[resize])(record)["instances"].gt_boxes.tensor
    assert boxes[0].tolist() == pytest.approx([22.4, 3.2, 26.4, 6.4])


def test_a_crop_that_leaves_nothing_of_a_box(record):
    """The left 10 x 20 pixels hold nothing of the box 28..33."""
    crop = T.CropTransform(0, 0, 10, 20)
    instances = DetectionDatasetMapper(augmentations=[crop])(record)["instances"]
    assert instances.gt_classes.tolist() == [1, 2]
    assert instances.gt_ignore.tolist() == [True, True]


def test_an_image_without_objects(record):
    record["annotations"] = []
    instances = DetectionDatasetMapper(augmentations=[])(record)["instances"]
    assert len(instances) == 0
    assert instances.gt_boxes.tensor.shape == (0, 4)
    assert instances.gt_ignore.dtype == torch.bool


def test_unknown_choices():
    with pytest.raises(ValueError, match="INPUT.DIFFICULT is 'skip'"):
        DetectionDatasetMapper(augmentations=[], difficult="skip")
    with pytest.raises(ValueError, match="INPUT.CROWD is 'train'"):
        DetectionDatasetMapper(augmentations=[], crowd="train")


def test_from_config_crops_and_resizes(record, tiny_cfg):
    tiny_cfg.INPUT.CROP.ENABLED = True
    tiny_cfg.INPUT.CROP.TYPE = "absolute"
    tiny_cfg.INPUT.CROP.SIZE = [10, 10]
    tiny_cfg.INPUT.MIN_SIZE_TRAIN = (30,)
    assert DetectionDatasetMapper(tiny_cfg)(record)["image"].shape == (3, 30, 30)


def test_color_jitter_changes_the_colours_alone(record, tiny_cfg):
    """On a grey image of 100 contrast (about the mean) and saturation change nothing.

    Brightness multiplies by [0.5, 1.5]: values of one image are equal, within 50 and 150.
    """
    Image.fromarray(np.full((20, 40, 3), 100, dtype=np.uint8)).save(record["file_name"])
    tiny_cfg.INPUT.MIN_SIZE_TRAIN = (20,)
    tiny_cfg.INPUT.RANDOM_FLIP = "none"
    plain = DetectionDatasetMapper(tiny_cfg)(record)
    tiny_cfg.INPUT.COLOR_JITTER = 0.5
    mapper = DetectionDatasetMapper(tiny_cfg)
    np.random.seed(0)
    mapped = [mapper(record) for _ in range(20)]
    values = {tuple(x["image"].unique().tolist()) for x in mapped}
    assert all(len(x) == 1 and 49 <= x[0] <= 150 for x in values)
    assert len(values) > 10
    for x in mapped:
        assert torch.equal(x["instances"].gt_boxes.tensor, plain["instances"].gt_boxes.tensor)
    tested = DetectionDatasetMapper(tiny_cfg, is_train=False)(record)["image"]
    assert tested.unique().tolist() == [100]


@pytest.mark.parametrize("strength", [-0.1, 1.0])
def test_color_jitter_out_of_range(tiny_cfg, strength):
    tiny_cfg.INPUT.COLOR_JITTER = strength
    with pytest.raises(ValueError, match="INPUT.COLOR_JITTER is"):
        DetectionDatasetMapper(tiny_cfg)
