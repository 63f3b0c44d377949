"""The grid of locations."""

import pytest
import torch

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
