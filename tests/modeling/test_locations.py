"""The grid of locations."""

import math

import pytest
import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from fcos_d2.modeling import compute_locations


def test_hand_computed_grid():
    """A 1x2 map of stride 8 and a 1x1 map of stride 16.

    (j + 0.5) * 8 is 4 and 12; (0 + 0.5) * 16 is 8.
    """
    locations = compute_locations([(1, 2), (1, 1)], [8, 16])
    assert locations.points.tolist() == [[4, 4], [12, 4], [8, 8]]
    assert locations.strides.tolist() == [8, 8, 16]
    assert locations.level_lengths == [2, 1]


@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_equals_plain_loops(offset):
    sizes, strides = [(5, 3), (3, 2), (1, 1)], [8, 16, 32]
    expected = [
        ((j + offset) * stride, (i + offset) * stride, stride)
        for (height, width), stride in zip(sizes, strides, strict=True)
        for i in range(height)
        for j in range(width)
    ]
    locations = compute_locations(sizes, strides, offset)
    got = torch.cat((locations.points, locations.strides[:, None]), dim=1)
    assert got.tolist() == [list(map(float, row)) for row in expected]


def test_steps_of_the_image():
    """Cells of stride 64 and 128 over a padded image of 416 x 480 pixels, offset 0.

    7 rows: 416 // 7 = 59 apart, 8 columns: 480 // 8 = 60; 4 rows: 104, 4 columns: 120. The stride
    stays the unit of the distances. On a stride that divides the image nothing changes.
    """
    locations = compute_locations(
        [(52, 60), (7, 8), (4, 4)], [8, 64, 128], 0.0, image_size=(416, 480)
    )
    assert locations.level_steps == [(8, 8), (59, 60), (104, 120)]
    assert locations.strides.unique().tolist() == [8, 64, 128]
    start = 52 * 60
    assert locations.points[start + 8 + 1].tolist() == [60, 59]
    assert locations.points[-1].tolist() == [3 * 120, 3 * 104]
    plain = compute_locations([(52, 60)], [8], 0.0)
    assert torch.equal(locations.points[:start], plain.points)


def test_steps_are_torchvisions():
    """Against `AnchorGenerator` on sizes that no large stride divides."""
    generator = AnchorGenerator(((8,), (16,), (32,), (64,), (128,)), ((1.0,),) * 5)
    strides = [8, 16, 32, 64, 128]
    for height, width in [(416, 480), (800, 1344), (64, 96), (512, 640)]:
        sizes = [(math.ceil(height / s), math.ceil(width / s)) for s in strides]
        maps = [torch.zeros(1, 1, *size) for size in sizes]
        images = ImageList(torch.zeros(1, 3, height, width), [(height, width)])
        (anchors,) = generator(images, maps)
        locations = compute_locations(sizes, strides, 0.0, image_size=(height, width))
        assert torch.equal((anchors[:, :2] + anchors[:, 2:]) / 2, locations.points)
        assert torch.equal(anchors[:, 2] - anchors[:, 0], locations.strides)


def test_level_of_an_index():
    locations = compute_locations([(2, 3), (1, 2), (1, 1)], [8, 16, 32])
    assert locations.level_of(torch.arange(9)).tolist() == [0] * 6 + [1] * 2 + [2]
    assert (2 ** (3 + locations.level_of(torch.arange(9))) == locations.strides).all()
