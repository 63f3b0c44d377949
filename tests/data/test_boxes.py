"""Boxes of records: what can be trained on, and COCO's sizes."""

import math
import re

import pytest

from fcos_d2.data.boxes import box_problem, size_of_area


@pytest.mark.parametrize(
    "box",
    [
        (0, 0, 60, 40),
        (0, 0, 0.5, 0.5),
        (59.5, 39.5, 70, 70),  # sticks out: clipped later
        (-10, -10, 100, 100),
    ],
)
def test_box_is_fine(box):
    assert box_problem(box, 60, 40) is None


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        ((5, 5, 5, 9), r"is empty or inverted \(width 0, height 4\)"),
        ((5, 9, 8, 5), r"is empty or inverted \(width 3, height -4\)"),
        ((60, 0, 70, 9), "lies wholly outside the image of 60x40 pixels"),
        ((0, 40, 9, 50), "lies wholly outside"),
        ((-9, 0, 0, 9), "lies wholly outside"),
        ((0, -9, 9, 0), "lies wholly outside"),
        ((math.nan, 0, 9, 9), "not finite"),
        ((0, 0, math.inf, 9), "not finite"),
    ],
)
def test_box_has_a_problem(box, reason):
    assert re.search(reason, box_problem(box, 60, 40))


def test_sizes_by_hand():
    """COCO's bounds are 32 * 32 = 1024 and 96 * 96 = 9216 pixels of the original image."""
    areas = [1, 1023.9, 1024, 9215, 9216, 1e6]
    assert size_of_area(areas).tolist() == ["small"] * 2 + ["medium"] * 2 + ["large"] * 2
