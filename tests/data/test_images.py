"""Images that are decoded at a fraction of their size."""

import math

import numpy as np
import pytest
import torch
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from PIL import Image

from fcos_d2.data import DetectionDatasetMapper
from fcos_d2.data.images import read_image, reduction


def photograph(width, height):
    """A smooth colour picture: what a decoder averages and what a resizing does agree on it."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / width * a + y / height * b) for a, b in ((9, 2), (3, 7), (5, 5))]
    return Image.fromarray((127 + 120 * np.stack(waves, axis=2)).astype(np.uint8))


@pytest.fixture
def save(tmp_path):
    """Save an image of a (stored) size and return its record, upright."""

    def save(width, height, suffix=".jpg", orientation=1):
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / f"a{suffix}"
        photograph(width, height).save(path, exif=exif)
        upright = (height, width) if orientation in (5, 6, 7, 8) else (width, height)
        box = [upright[0] // 4, upright[1] // 4, upright[0] // 2, upright[1] // 2]
        annotation = {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": 3}
        return {
            "file_name": str(path),
            "width": upright[0],
            "height": upright[1],
            "annotations": [annotation],
        }

    return save


@pytest.mark.parametrize(
    "size, new_size, factor",
    [
        ((800, 1000), (800, 1000), 1),
        ((800, 1000), (1600, 2000), 1),
        ((800, 1000), (401, 501), 1),
        ((800, 1000), (400, 500), 2),
        ((800, 1000), (400, 501), 1),
        ((800, 1000), (150, 187), 4),
        ((800, 1000), (50, 62), 8),
        ((803, 1001), (100, 125), 8),
    ],
)
def test_reduction_by_hand(size, new_size, factor):
    """The reduced image has at least as many pixels each way as what it is resized to."""
    assert reduction(T.ResizeTransform(*size, *new_size)) == factor
    for full, new in zip(size, new_size, strict=True):
        assert factor == 1 or math.ceil(full / factor) >= new


def test_no_resizing_is_no_reduction():
    assert reduction(T.NoOpTransform()) == 1


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_reduced_image_is_the_mean_of_its_pixels(save, factor, orientation):
    """243 x 165 is divided by no factor: sides are rounded up. It is upright like the full one."""
    record = save(243, 165, orientation=orientation)
    image = read_image(record, "BGR", factor)
    size = math.ceil(record["height"] / factor), math.ceil(record["width"] / factor)
    assert image.shape == (*size, 3)
    stored = np.asarray(Image.open(record["file_name"]).reduce(factor))
    expected = np.rot90(stored, {1: 0, 3: 2, 6: -1, 8: 1}[orientation])[..., ::-1]
    assert np.abs(image.astype(float) - expected).mean() < (2 if factor > 1 else 1e-9)


def test_other_files_come_in_full(save):
    record = save(120, 80, ".png")
    assert np.array_equal(read_image(record, "RGB", 4), read_image(record, "RGB"))


@pytest.mark.parametrize("factor", [1, 4])
@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_a_file_of_another_size(save, factor, suffix):
    record = save(120, 80, suffix)
    with pytest.raises(utils.SizeMismatchError, match=f"a{suffix}"):
        read_image({**record, "width": 160}, "RGB", factor)


@pytest.mark.parametrize("is_train", [True, False])
def test_mapped_alike_but_for_the_decoding(save, is_train):
    """Same random size and flip, same boxes, nearly the same pixels; and the file is cut short."""
    record = save(905, 603)
    augmentations = [T.ResizeShortestEdge((100, 150), 400, "choice"), T.RandomFlip(prob=0.5)]
    for seed in range(4):
        results = []
        for reduced in (True, False):
            mapper = DetectionDatasetMapper(
                augmentations=augmentations, reduced_jpeg=reduced, is_train=is_train
            )
            np.random.seed(seed)
            results.append(mapper(record))
        mine, plain = results
        assert mine["image"].shape == plain["image"].shape
        difference = (mine["image"].float() - plain["image"].float()).abs().mean()
        assert 0 < difference < 3
        assert ("instances" in mine) == is_train
        if is_train:
            boxes = [x["instances"].gt_boxes.tensor for x in results]
            assert torch.equal(*boxes) and len(boxes[0]) == 1


@pytest.mark.parametrize("first", [T.RandomCrop("absolute", (50, 50)), T.RandomFlip(prob=1.0)])
def test_nothing_is_reduced_before_another_augmentation(save, first):
    """A crop of a photograph can be as large as the network's input."""
    record = save(905, 603)
    results = []
    for reduced in (True, False):
        augmentations = [first, T.ResizeShortestEdge(100, 400)]
        np.random.seed(0)
        mapper = DetectionDatasetMapper(augmentations=augmentations, reduced_jpeg=reduced)
        results.append(mapper(record)["image"])
    assert torch.equal(*results)


@pytest.mark.parametrize("value", [True, False])
def test_the_key_is_for_training_only(tiny_cfg, value):
    tiny_cfg.INPUT.REDUCED_JPEG_TRAIN = value
    assert DetectionDatasetMapper(tiny_cfg).reduced_jpeg == value
    assert not DetectionDatasetMapper(tiny_cfg, is_train=False).reduced_jpeg
