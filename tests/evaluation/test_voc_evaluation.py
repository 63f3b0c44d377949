"""VOC's average precision against hand-computed numbers and Detectron2's port of the devkit."""

import numpy as np
import pytest
from detectron2.evaluation.pascal_voc_evaluation import voc_eval

from fcos_d2.evaluation import voc_average_precision

from .conftest import found, record


def numbers(records, predictions, names=("cat",)):
    """AP50 (11-point, area) of the table."""
    table, _ = voc_average_precision(records, predictions, names)
    return table["AP50_11point"], table["AP50_area"]


def test_perfect_predictions_are_100():
    records = [record("a", (0, 0, 0, 10, 10), (1, 20, 20, 50, 40)), record("b")]
    predictions = [found("a", 0, 0, 0, 10, 10, 0.4), found("a", 1, 20, 20, 50, 40, 0.9)]
    assert numbers(records, predictions, ("cat", "dog")) == (100.0, 100.0)


def test_a_duplicate_and_two_misses():
    """Four objects. By score: right, duplicate (wrong), right; two are never found.

    Recall 1/4, 1/4, 2/4; precision 1, 1/2, 2/3.
    Area: 1/4 * 1 + 1/4 * 2/3 = 5/12.
    11 points: 0, 0.1, 0.2 have 1; 0.3, 0.4, 0.5 have 2/3; the rest 0: (3 + 2) / 11 = 5/11.
    """
    boxes = [(20 * i, 0, 20 * i + 10, 10) for i in range(4)]
    records = [record(7, *((0, *box) for box in boxes))]
    order = [(boxes[0], 0.9), (boxes[0], 0.8), (boxes[1], 0.7)]
    predictions = [found(7, 0, *box, score) for box, score in order]
    assert numbers(records, predictions) == pytest.approx((500 / 11, 500 / 12), abs=1e-12)


def test_difficult_objects_are_neither_right_nor_wrong():
    """One object and a difficult one. By score: the difficult one twice, then the object.

    Both hits on the difficult one drop out: recall 1 at precision 1. Without the flag it is two
    objects found by right, duplicate, right: recall 1/2, 1/2, 1 at 1, 1/2, 2/3, area
    1/2 + 1/2 * 2/3 = 5/6.
    """
    predictions = [
        found("a", 0, 0, 0, 10, 10, 0.9),
        found("a", 0, 0, 0, 10, 11, 0.8),
        found("a", 0, 30, 30, 50, 50, 0.7),
    ]
    for difficult, area in ((1, 100.0), (0, 500 / 6)):
        flags = {"difficult": difficult}
        records = [record("a", (0, 0, 0, 10, 10, flags), (0, 30, 30, 50, 50))]
        assert numbers(records, predictions)[1] == pytest.approx(area)


def test_a_crowd_is_ignored_too():
    records = [record("a", (0, 0, 0, 10, 10), (0, 30, 30, 50, 50, {"iscrowd": 1}))]
    predictions = [found("a", 0, 30, 30, 50, 50, 0.9), found("a", 0, 0, 0, 10, 10, 0.8)]
    assert numbers(records, predictions) == (100.0, 100.0)


def test_a_detection_goes_to_its_best_object_even_if_that_is_taken():
    """Boxes [0, 10] and [4, 14] x [0, 10]; both detections are nearest to the first.

    The second detection [1.5, 11.5] has IoU 8.5/11.5 with the first and 7.5/12.5 with the second
    object; the devkit counts it as a duplicate, COCO would give it the second object.
    Area AP: recall 1/2 at precision 1, so 1/2.
    """
    records = [record("a", (0, 0, 0, 10, 10), (0, 4, 0, 14, 10))]
    predictions = [found("a", 0, 0, 0, 10, 10, 0.9), found("a", 0, 1.5, 0, 11.5, 10, 0.8)]
    assert numbers(records, predictions)[1] == 50.0


@pytest.mark.parametrize(("width", "expected"), [(5.0, 100.0), (4.99, 0.0)])
def test_an_iou_of_one_half_is_enough(width, expected):
    """A box of width w inside one of width 10: IoU w / 10."""
    records = [record("a", (0, 0, 0, 10, 10))]
    assert numbers(records, [found("a", 0, 0, 0, width, 10, 0.9)])[1] == expected


def test_no_predictions_are_zero_and_no_objects_are_nan():
    records = [record("a", (0, 0, 0, 10, 10)), record("b", (1, 0, 0, 5, 5, {"difficult": 1}))]
    table, classes = voc_average_precision(records, [], ("cat", "dog", "cow"))
    assert table == classes[0] == {"AP50_11point": 0.0, "AP50_area": 0.0}
    assert all(np.isnan(value) for row in classes[1:] for value in row.values())
    empty, _ = voc_average_precision([record("a")], [], ("cat",))
    assert all(np.isnan(value) for value in empty.values())


def test_predictions_on_an_image_without_objects_are_wrong():
    """Wrong at 0.9, right at 0.8: recall 1 at precision 1/2."""
    records = [record("a"), record("b", (0, 0, 0, 10, 10))]
    predictions = [found("a", 0, 0, 0, 10, 10, 0.9), found("b", 0, 0, 0, 10, 10, 0.8)]
    assert numbers(records, predictions) == pytest.approx((50.0, 50.0))


def write_voc(folder, records, predictions, names):
    """The devkit's files of these records and predictions, 1-based and inclusive."""
    for entry in records:
        objects = "".join(
            f"<object><name>{names[item['category_id']]}</name><pose>x</pose>"
            f"<truncated>0</truncated><difficult>{item['difficult']}</difficult><bndbox>"
            f"<xmin>{box[0] + 1}</xmin><ymin>{box[1] + 1}</ymin><xmax>{box[2]}</xmax>"
            f"<ymax>{box[3]}</ymax></bndbox></object>"
            for item in entry["annotations"]
            for box in [item["bbox"]]
        )
        xml = f"<annotation>{objects}</annotation>"
        (folder / f"{entry['image_id']}.xml").write_text(xml)
    (folder / "set.txt").write_text("\n".join(entry["image_id"] for entry in records))
    for k, name in enumerate(names):
        lines = [
            f"{p['image_id']} {p['score']!r} {x + 1!r} {y + 1!r} {x + w!r} {y + h!r}"
            for p in predictions
            if p["category_id"] == k
            for x, y, w, h in [p["bbox"]]
        ]
        (folder / f"det_{name}.txt").write_text("\n".join(lines))


@pytest.mark.parametrize("seed", range(4))
def test_equals_detectron2_on_random_data(tmp_path, seed):
    """40 images, 3 classes, overlapping objects, jittered, duplicate and random detections."""
    rng = np.random.default_rng(seed)
    names, records, predictions = ("cat", "dog", "cow"), [], []
    for i in range(40):
        objects = []
        for _ in range(rng.integers(0, 5)):
            x, y, w, h = (int(value) for value in rng.integers([0, 0, 10, 10], [60, 60, 60, 60]))
            category = int(rng.integers(3))
            difficult = {"difficult": int(rng.random() < 0.25)}
            objects.append((category, x, y, x + w, y + h, difficult))
            for _ in range(rng.integers(0, 4)):
                box = np.array([x, y, x + w, y + h]) + rng.normal(0, 3, 4)
                predictions.append(found(f"{i:06d}", category, *box.tolist(), float(rng.random())))
        records.append(record(f"{i:06d}", *objects))
        x, y = rng.uniform(0, 50, 2).tolist()
        predictions.append(found(f"{i:06d}", i % 3, x, y, x + 30, y + 20, float(rng.random())))
    # Detectron2 rounds the recall points 0.3, 0.6 and 0.7 up: tenths of the objects are avoided.
    for k in range(3):
        objects = [item for entry in records for item in entry["annotations"]]
        if sum(item["category_id"] == k and not item["difficult"] for item in objects) % 10 == 0:
            records.append(record(f"{40 + k:06d}", (k, 0, 0, 30, 20, {"difficult": 0})))
    write_voc(tmp_path, records, predictions, names)
    table, classes = voc_average_precision(records, predictions, names)
    files = [f"{tmp_path}/det_{{}}.txt", f"{tmp_path}/{{}}.xml", f"{tmp_path}/set.txt"]
    for key, is_2007 in (("AP50_11point", True), ("AP50_area", False)):
        expected = [100 * voc_eval(*files, name, 0.5, is_2007)[2] for name in names]
        assert [row[key] for row in classes] == pytest.approx(expected, abs=1e-9)
        assert 5 < table[key] < 95
        assert table[key] == pytest.approx(np.mean(expected), abs=1e-9)
