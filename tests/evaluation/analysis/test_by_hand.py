"""Error analysis of cases computed by hand."""

import numpy as np
import pytest

from fcos_d2.evaluation import analysis
from fcos_d2.evaluation.analysis import ERROR_TYPES

from ..conftest import make_record, predict

CLASSES = ["cat", "dog", "fox"]


def test_an_ignored_object_takes_only_what_no_other_does():
    """IoU: 0.8 with the difficult one (8 of 10 rows), 0.6 with the real one (6 of 10): the real."""
    record = make_record("a", (0, [0, 0, 10, 8], {"difficult": 1}), (0, [0, 0, 10, 6]))
    found = [predict("a", 0, [0, 0, 10, 10], score) for score in (0.9, 0.8, 0.7)]
    table = analysis.match_detections([record], found, CLASSES)
    assert table["outcome"].tolist() == ["tp", "ignored", "fp"]
    assert table["truth"].tolist() == [1, 0, -1]
    assert table["iou"].tolist() == pytest.approx([0.6, 0.8, 0])


def test_a_crowd_takes_any_number():
    record = make_record("a", (0, [0, 0, 100, 100], {"iscrowd": 1}))
    found = [predict("a", 0, [10 * i, 0, 5, 5], 0.5) for i in range(3)]
    assert (
        analysis.match_detections([record], found, CLASSES)["outcome"].tolist() == ["ignored"] * 3
    )


def test_only_the_best_100_of_an_image_and_class_count():
    found = [predict("a", k, [i, 0, 5, 5], 0.9) for k in (0, 1) for i in range(101)]
    table = analysis.match_detections([make_record("a")], found, CLASSES)
    assert table["outcome"].value_counts().to_dict() == {"fp": 200, "ignored": 2}


def test_objects():
    """Areas: 32^2 = 1024 is medium, just less small; 96^2 = 9216 large."""
    boxes = [[0, 0, 32, 31.9], [0, 0, 32, 32], [0, 0, 96, 96]]
    objects = [(0, boxes[0]), (1, boxes[1], {"difficult": 1}), (2, boxes[2], {"iscrowd": 1})]
    table = analysis.ground_truth([make_record("a"), make_record("b", *objects)], CLASSES)
    assert table["size"].tolist() == ["small", "medium", "large"]
    assert table["ignored"].tolist() == [False, True, True]
    assert table["area"].tolist() == pytest.approx([1020.8, 1024, 9216])
    assert table["index"].tolist() == [0, 1, 2] and set(table["image_id"]) == {"b"}


def test_what_does_not_fit_together():
    found = [predict("b", 0, [0, 0, 5, 5], 0.5)]
    with pytest.raises(ValueError, match="image 'b', which is not among"):
        analysis.match_detections([make_record("a")], found, CLASSES)
    with pytest.raises(ValueError, match="object 1 of image 'a' has class id 7"):
        analysis.ground_truth([make_record("a", (7, [0, 0, 5, 5]))], CLASSES)


BOX, OTHER = [0, 0, 50, 50], [100, 100, 50, 50]


def test_a_curve_by_hand():
    """Right, wrong, right of 2 cats: F1 is 2 / 3, 1 / 2 and 2 * 2 / (3 + 2) = 0.8, at score 0.7."""
    record = make_record("a", (0, BOX), (0, OTHER))
    found = [(BOX, 0.9), ([0, 100, 9, 9], 0.8), (OTHER, 0.7)]
    curves = analysis.precision_recall([record], [predict("a", 0, *x) for x in found], CLASSES)
    cat, dog, _ = curves
    assert cat.precision.tolist() == pytest.approx([1, 1 / 2, 2 / 3])
    assert cat.recall.tolist() == [0.5, 0.5, 1]
    assert (cat.best_f1, cat.best_threshold) == (pytest.approx(0.8), 0.7)
    assert (cat.best_precision, cat.best_recall) == (pytest.approx(2 / 3), 1)
    assert dog.num_ground_truth == 0 and len(dog.score) == 0
    assert np.isnan([dog.best_f1, dog.best_threshold, dog.best_precision, dog.best_recall]).all()


def test_a_threshold_keeps_equal_scores_together():
    """Right 0.9, wrong 0.9: no threshold keeps the first alone; F1 is 2 / (2 + 1) = 2 / 3."""
    found = [predict("a", 0, box, 0.9) for box in (BOX, OTHER)]
    cat = analysis.precision_recall([make_record("a", (0, BOX))], found, CLASSES)[0]
    assert (cat.best_f1, cat.best_threshold) == (pytest.approx(2 / 3), 0.9)
    assert (cat.best_precision, cat.best_recall) == (0.5, 1)


def test_confusion_by_hand():
    """A cat found as dog; a dog as itself, though a fox fits as well; a fox missed; background."""
    objects = [(0, BOX), (1, OTHER), (2, [100, 100, 50, 49]), (2, [0, 150, 9, 9], {"difficult": 1})]
    found = [(1, BOX, 0.9), (1, [100, 100, 50, 49], 0.8), (0, [150, 0, 20, 20], 0.7)]
    # On the difficult one: not counted; below the threshold.
    found += [(0, [0, 150, 9, 9], 0.6), (2, OTHER, 0.1)]
    record = make_record("a", *objects)
    predictions = [predict("a", *x) for x in found]
    matrix = analysis.confusion_matrix([record], predictions, CLASSES, score_thresh=0.5)
    assert matrix.tolist() == [[0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1], [1, 0, 0, 0]]


def test_calibration_by_hand():
    """Bins of a half: 0.2 wrong, 0.4 right; 0.9 right: gaps 0.5 - 0.3 and 1 - 0.9.

    ECE = (2 * 0.2 + 1 * 0.1) / 3.
    """
    record = make_record("a", (0, BOX), (0, OTHER))
    found = [(BOX, 0.9), ([0, 100, 9, 9], 0.2), (OTHER, 0.4)]
    predictions = [predict("a", 0, *x) for x in found]
    table, ece = analysis.calibration([record], predictions, CLASSES, bins=2)
    assert table["count"].tolist() == [2, 1]
    assert table["mean_score"].tolist() == pytest.approx([0.3, 0.9])
    assert table["precision"].tolist() == [0.5, 1]
    assert ece == pytest.approx(0.5 / 3)


def test_calibration_refuses_scores_that_are_no_share():
    records, found = [make_record("a")], [predict("a", 0, BOX, s) for s in (0.0, 1.5)]
    with pytest.raises(ValueError, match="scores range from 0.0 to 1.5"):
        analysis.calibration(records, found, CLASSES)
    with pytest.raises(ValueError, match="bins is 0"):
        analysis.calibration(records, [], CLASSES, bins=0)


def test_images_worst_first():
    """c finds nothing of one; b one of two, F1 2 / 3; a has nothing to find; d is right."""
    records = [
        make_record("a"),
        make_record("b", (0, BOX), (0, OTHER)),
        make_record("c", (0, BOX)),
        make_record("d", (0, BOX), (1, OTHER, {"difficult": 1})),
    ]
    found = [("b", 0, BOX, 0.9), ("c", 0, OTHER, 0.9), ("d", 0, BOX, 0.6), ("d", 1, OTHER, 0.6)]
    found.append(("d", 2, OTHER, 0.1))  # below the threshold
    predictions = [predict(*x) for x in found]
    table = analysis.rank_images(records, predictions, CLASSES, score_thresh=0.5)
    assert table["image_id"].tolist() == ["c", "b", "a", "d"]
    assert table["f1"].tolist() == pytest.approx([0, 2 / 3, 1, 1])
    counts = table[["tp", "fp", "fn"]].to_numpy().tolist()
    assert counts == [[0, 1, 1], [1, 0, 1], [0, 0, 0], [1, 0, 0]]


BOX = [0, 0, 100, 100]
# What is found where a cat is at BOX (a dog is far away), and the error that it is.
CASES = {
    "classification": (1, [0, 0, 100, 90]),  # IoU 0.9, but a dog
    "localisation": (0, [0, 0, 100, 30]),  # IoU 0.3
    "both": (1, [0, 0, 100, 30]),
    "background": (0, [0, 0, 100, 9]),  # IoU 0.09
}


def breakdown(objects, found):
    predictions = [predict("a", *x) for x in found]
    return analysis.error_breakdown([make_record("a", *objects)], predictions, CLASSES)


@pytest.mark.parametrize("kind", CASES)
def test_one_error(kind):
    """The dog is found, the cat is not: AP50 is the mean of 0 and 100 (a cat found too late: 0).

    Mending a wrong class or box finds the cat: both 100, a gain of 50. Without "both" or
    "background" the cat stays missed. In those two cases it counts as missed, and mending that
    leaves no cats: their AP stays 0.
    """
    dog = (1, [150, 150, 40, 40])
    result = breakdown([(0, BOX), dog], [(*CASES[kind], 0.5), (*dog, 0.9)])
    assert result.AP50 == pytest.approx(50)
    corrects = kind in ("classification", "localisation")
    assert result.dap.loc[kind, "dAP"] == pytest.approx(50 if corrects else 0)
    assert result.dap.loc["missed", "dAP"] == 0
    expected = dict.fromkeys(ERROR_TYPES, 0) | {kind: 1, "missed": 0 if corrects else 1}
    assert result.counts.sum().to_dict() == expected
    assert result.counts.loc["dog" if CASES[kind][0] else "cat", kind] == 1
    size = "small" if kind == "background" and 100 * 9 < 32**2 else "large"
    assert result.by_size.loc[size, kind] == 1


def test_a_duplicate():
    """Right 0.9, twice 0.8, right 0.7 of two cats: precision 1 to recall 0.5, then 2 / 3.

    51 of the 101 recalls are at most 0.5: AP = (51 + 50 * 2 / 3) / 101 = 0.8350. Without the
    duplicate 1.
    """
    other = [150, 150, 40, 40]
    found = [(0, BOX, 0.9), (0, [0, 0, 100, 95], 0.8), (0, other, 0.7)]
    result = breakdown([(0, BOX), (0, other)], found)
    assert result.AP50 == pytest.approx(100 * (51 + 50 * 2 / 3) / 101)
    gain = 100 - result.AP50
    expected = {"duplicate": gain, "false positives": gain, "false negatives": 0}
    assert result.dap["dAP"].to_dict() == pytest.approx(dict.fromkeys(ERROR_TYPES, 0) | expected)


def test_missed_objects():
    """One of two cats is found: AP50 is 51 / 101 (the recalls up to 0.5); of one cat it is 1."""
    result = breakdown([(0, BOX), (0, [150, 150, 40, 40])], [(0, BOX, 0.9)])
    assert result.AP50 == pytest.approx(100 * 51 / 101)
    for kind in ("missed", "false negatives"):
        assert result.dap.loc[kind, "dAP"] == pytest.approx(100 * 50 / 101)
    assert result.by_size.loc["medium", "missed"] == 1


@pytest.mark.parametrize(("second", "ap50"), [(BOX, 50), ([0, 0, 100, 20], 0)])
def test_one_detection_per_object_is_corrected(second, ap50):
    """The first box is poor; removed if the second is right (precision 1 / 2), else corrected.

    A second poor box would be a duplicate of the corrected one: it is removed. AP is 100.
    """
    result = breakdown([(0, BOX)], [(0, [0, 0, 100, 30], 0.9), (0, second, 0.8)])
    assert result.AP50 == pytest.approx(ap50)
    assert result.dap.loc["localisation", "dAP"] == pytest.approx(100 - ap50)
    assert result.counts.loc["cat", "missed"] == 0


def test_ignored_objects_make_no_errors():
    """What takes a difficult cat is no error; what takes it a second time is background."""
    difficult = (0, BOX, {"difficult": 1})
    result = breakdown([difficult, (1, [150, 150, 40, 40])], [(0, BOX, 0.9)])
    assert result.counts.sum().to_dict() == dict.fromkeys(ERROR_TYPES, 0) | {"missed": 1}
    twice = breakdown([difficult], [(0, BOX, 0.9), (0, BOX, 0.8)])
    assert twice.counts.loc["cat"].to_dict() == dict.fromkeys(ERROR_TYPES, 0) | {"background": 1}


def test_bad_thresholds():
    with pytest.raises(ValueError, match="background_iou 0.6 and foreground_iou 0.5"):
        analysis.error_breakdown([], [], CLASSES, background_iou=0.6)
