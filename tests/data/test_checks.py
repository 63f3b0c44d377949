"""The check of a box, and the report of bad ones."""

import logging
import math
import re

import pytest

from fcos_d2.data.checks import MAX_REPORTED, DataError, Problems, box_problem


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


def test_no_problem_is_no_error_and_no_line(caplog):
    for skip in (False, True):
        Problems("mine", skip=skip).finish()
    assert not caplog.records


def test_problems_are_raised_together_and_the_message_stays_short():
    problems = Problems("mine", skip=False)
    for number in range(MAX_REPORTED + 2):
        problems.add(f"bad box {number}.")
    with pytest.raises(DataError) as caught:
        problems.finish()
    message = str(caught.value)
    assert message.startswith(f"{MAX_REPORTED + 2} bad box(es) in mine:\n  bad box 0.\n  bad box 1")
    assert f"bad box {MAX_REPORTED}." not in message
    assert "... and 2 more" in message
    assert "DATASETS.SKIP_BAD_BOXES True" in message


def test_skipped_problems_are_counted_in_one_line(caplog):
    problems = Problems("mine", skip=True)
    problems.add("a.xml, object 1")
    problems.add("b.xml, object 3")
    with caplog.at_level(logging.WARNING):
        problems.finish()
    (record,) = caplog.records
    assert "mine: left out 2 bad box(es)" in record.getMessage()
    assert "b.xml, object 3" in record.getMessage()
