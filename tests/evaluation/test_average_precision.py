"""Average precision of curves computed by hand."""

import numpy as np
import pytest

from fcos_d2.evaluation.average_precision import (
    area_ap,
    coco_ap,
    eleven_point_ap,
    precision_at,
    precision_recall,
)


def curve(right, positives):
    right = np.array(right, dtype=bool)
    return precision_recall(right, ~right, positives)


def test_precision_at_recall():
    """Right, wrong, right of 3 objects: precision 1, 1/2, 2/3 at recall 1/3, 1/3, 2/3.

    The best precision at a recall of at least 0 and 1/3 is 1, at 0.5 and 2/3 it is 2/3; no
    detection reaches 0.7.
    """
    levels = precision_at(*curve([1, 0, 1], 3), np.array([0, 1 / 3, 0.5, 2 / 3, 0.7, 1]))
    assert levels == pytest.approx([1, 1, 2 / 3, 2 / 3, 0, 0])
    assert precision_at(*curve([], 3), np.array([0.0, 1.0])).tolist() == [0, 0]


def test_coco_ap():
    """Right, wrong, right of 2: precision 1 up to recall 0.5, then 2/3."""
    assert coco_ap(*curve([1, 0, 1], 2)) == pytest.approx((51 + 50 * 2 / 3) / 101)
    assert coco_ap(*curve([0, 0], 0)) == coco_ap(*curve([], 2)) == 0


def test_a_recall_of_exactly_three_tenths_reaches_its_point():
    """Three of ten objects, no wrong one: points 0, 0.1, 0.2, 0.3 have precision 1, so 4/11."""
    assert eleven_point_ap(*curve([1, 1, 1], 10)) == pytest.approx(4 / 11)
    assert area_ap(*curve([1, 1, 1], 10)) == pytest.approx(0.3)
