"""COCO's table against hand-computed numbers and plain pycocotools."""

import contextlib
import copy
import io
import json
import math

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fcos_d2.evaluation import coco_table, voc_average_precision
from fcos_d2.evaluation.coco_evaluation import COCO_ROWS, json_category_ids

from .conftest import found, record


def ap50(records, predictions):
    """AP50 of a single class."""
    return coco_table(records, predictions, ["cat"])[0]["AP50"]


def test_perfect_predictions_are_100():
    """Sides 10, 50 and 100 are COCO's small (< 32), medium (< 96) and large."""
    boxes = [(0, 0, 10, 10), (20, 0, 70, 50), (100, 0, 200, 100)]
    records = [record("a", *((0, *box) for box in boxes)), record("b")]
    predictions = [found("a", 0, *box, 0.5) for box in boxes]
    table, classes = coco_table(records, predictions, ["cat"])
    assert table.pop("AR1") == pytest.approx(100 / 3)  # one detection an image, three objects
    assert table.keys() == {row[0] for row in COCO_ROWS} - {"AR1"}
    assert all(value == pytest.approx(100) for value in table.values())
    assert classes == [{"AP": pytest.approx(100), "AP50": pytest.approx(100)}]


def test_a_duplicate_and_two_misses():
    """Four objects in an image. By score: right, duplicate (wrong), right; two are never found.

    Recall 1/4, 1/4, 2/4; precision 1, 1/2, 2/3. Of the 101 recall points 0 to 0.25 (26) have 1,
    0.26 to 0.50 (25) have 2/3: (26 + 25 * 2/3) / 101. Boxes are exact, so every IoU gives that.
    AR: 2 of 4 with 10 or 100 detections an image, 1 of 4 with one.
    """
    boxes = [(20 * i, 0, 20 * i + 10, 10) for i in range(4)]
    records = [record(7, *((0, *box) for box in boxes))]
    order = [(boxes[0], 0.9), (boxes[0], 0.8), (boxes[1], 0.7)]
    table, _ = coco_table(records, [found(7, 0, *box, score) for box, score in order], ["cat"])
    expected = 100 * (26 + 25 * 2 / 3) / 101
    for key in ("AP", "AP50", "AP75", "APs"):
        assert table[key] == pytest.approx(expected)
    assert (table["AR1"], table["AR10"], table["AR100"]) == pytest.approx((25, 50, 50))
    assert math.isnan(table["APm"]) and math.isnan(table["ARl"])


def test_iou_thresholds():
    """IoU 0.72 (a box of height 7.2 in one of 10): found at 0.50, 0.55 ... 0.70, five of ten."""
    records = [record("a", (0, 0, 0, 10, 10))]
    table, _ = coco_table(records, [found("a", 0, 0, 0, 10, 7.2, 0.9)], ["cat"])
    assert (table["AP"], table["AP50"], table["AP75"]) == pytest.approx((50, 100, 0))


def test_difficult_takes_one_detection_and_a_crowd_any_number():
    """By score: the ignored object, the ignored object again, the object.

    Difficult: ignored, wrong, right, so recall 1 at precision 1/2. Crowd: ignored, ignored, right.
    Neither: right, wrong, right over two objects: points to 0.5 (51) have 1, the other 50 have
    2/3: (51 + 50 * 2/3) / 101. A missed difficult object costs nothing.
    """
    predictions = [found("a", 0, 30, 30, 50, 50, score) for score in (0.9, 0.8)]
    predictions.append(found("a", 0, 0, 0, 10, 10, 0.7))
    for flags, expected in (
        ({"difficult": 1, "iscrowd": 0}, 50),
        ({"difficult": 0, "iscrowd": 1}, 100),
        ({"difficult": 0, "iscrowd": 0}, 100 * (51 + 50 * 2 / 3) / 101),
    ):
        records = [record("a", (0, 0, 0, 10, 10), (0, 30, 30, 50, 50, flags))]
        assert ap50(records, predictions) == pytest.approx(expected)
        if flags["difficult"]:
            assert ap50(records, predictions[2:]) == pytest.approx(100)


def test_difficult_overlap_is_ordinary_iou():
    """A detection of 20 x 20 inside an ignored 100 x 100, IoU 0.04, before the object's own.

    Difficult: it does not match and is wrong, precision 1/2. In a crowd it lies wholly: ignored.
    """
    predictions = [found("a", 0, 40, 40, 60, 60, 0.9), found("a", 0, 200, 0, 210, 10, 0.8)]
    for flags, expected in (({"difficult": 1}, 50), ({"iscrowd": 1}, 100)):
        records = [record("a", (0, 0, 0, 100, 100, flags), (0, 200, 0, 210, 10))]
        assert ap50(records, predictions) == pytest.approx(expected)


def test_no_predictions_are_zero_and_no_objects_are_nan():
    records = [record("a", (0, 0, 0, 10, 10)), record("b")]
    table, classes = coco_table(records, [], ["cat", "dog"])
    zero = {"AP", "AP50", "AP75", "APs", "AR1", "AR10", "AR100", "ARs"}
    assert {key for key, value in table.items() if value == 0} == zero
    assert all(math.isnan(value) for key, value in table.items() if key not in zero)
    assert classes[0] == {"AP": 0.0, "AP50": 0.0}
    assert all(math.isnan(value) for value in classes[1].values())
    empty, _ = coco_table([record("a")], [found("a", 0, 0, 0, 5, 5, 0.5)], ["cat"])
    assert all(math.isnan(value) for value in empty.values())


@pytest.mark.parametrize("measure", [coco_table, voc_average_precision])
@pytest.mark.parametrize(
    ("prediction", "message"),
    [
        (("z", 0, 0, 0, 1, 1, 0.5), "image 'z'"),
        (("a", 1, 0, 0, 1, 1, 0.5), "class id 1.*1 classes"),
        (("a", -1, 0, 0, 1, 1, 0.5), "class id -1.*1 classes"),
        (("a", 0, 0, 0, 1, 1, math.nan), "not finite"),
    ],
)
def test_predictions_that_do_not_fit_are_refused(measure, prediction, message):
    with pytest.raises(ValueError, match=message):
        measure([record("a", (0, 0, 0, 10, 10))], [found(*prediction)], ["cat"])


def random_dataset(seed, category_ids):
    """A COCO json, the records that Detectron2 would make of it, and predictions."""
    rng = np.random.default_rng(seed)
    annotations, records, predictions = [], [], []
    for i in range(25):
        image_id, objects = 100 + 3 * i, []
        for _ in range(rng.integers(0, 6)):
            box = rng.uniform([0, 0, 8, 8], [80, 80, 150, 150]).tolist()
            category, crowd = int(rng.integers(len(category_ids))), int(rng.random() < 0.1)
            x, y, w, h = box
            item = {"id": len(annotations) + 1, "bbox": box, "area": w * h, "iscrowd": crowd}
            ids = {"image_id": image_id, "category_id": category_ids[category]}
            annotations.append({**item, **ids})
            objects.append((category, x, y, x + w, y + h, {"iscrowd": crowd}))
            for _ in range(rng.integers(0, 4)):
                corners = (np.array([x, y, x + w, y + h]) + rng.normal(0, 5, 4)).tolist()
                predictions.append(found(image_id, category, *corners, float(rng.random())))
        records.append(record(image_id, *objects))
    dataset = {
        "images": [{"id": entry["image_id"]} for entry in records],
        "categories": [{"id": i, "name": f"class{i}"} for i in sorted(category_ids)],
        "annotations": annotations,
    }
    return dataset, records, predictions


@pytest.mark.parametrize("seed", range(3))
def test_equals_plain_cocoeval_on_random_data(tmp_path, seed):
    category_ids = [3, 7, 20]
    names = [f"class{i}" for i in category_ids]
    dataset, records, predictions = random_dataset(seed, category_ids)
    json_file = tmp_path / "instances.json"
    json_file.write_text(json.dumps(dataset))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(json_file))
        results = [{**x, "category_id": category_ids[x["category_id"]]} for x in predictions]
        plain = COCOeval(truth, truth.loadRes(copy.deepcopy(results)), "bbox")
        plain.evaluate()
        plain.accumulate()
        plain.summarize()
    kept = copy.deepcopy(predictions)
    for source in (None, str(json_file)):
        table, classes = coco_table(records, predictions, names, source)
        measured = [math.nan if stat == -1 else 100 * stat for stat in plain.stats]
        assert list(table.values()) == pytest.approx(measured, abs=1e-9, nan_ok=True)
        for k, row in enumerate(classes):
            precision = plain.eval["precision"][:, :, k, 0, 2]
            assert row["AP"] == pytest.approx(100 * precision.mean())
            assert row["AP50"] == pytest.approx(100 * precision[0].mean())
        assert 5 < table["AP"] < 95
    assert predictions == kept  # pycocotools writes into what it is given


def test_json_areas_are_used_and_missing_fields_filled_in(tmp_path):
    """A 40 x 40 box is medium; with an area of 400 in the json (its segment's) it is small.

    The json's annotation id is 0, which plain COCOeval takes for "not matched".
    """
    item = {"id": 0, "image_id": 5, "category_id": 1, "bbox": [0, 0, 40, 40]}
    dataset = {"images": [{"id": 5}, {"id": 6}], "categories": [{"id": 1, "name": "cat"}]}
    data = [record(5, (0, 0, 0, 40, 40))], [found(5, 0, 0, 0, 40, 40, 0.9)], ["cat"]
    json_file = tmp_path / "instances.json"
    for extra, key in (({}, "APm"), ({"area": 400.0}, "APs")):
        json_file.write_text(json.dumps({**dataset, "annotations": [{**item, **extra}]}))
        table, _ = coco_table(*data, str(json_file))
        assert table["AP"] == pytest.approx(100) and table[key] == pytest.approx(100)


def test_a_json_of_other_classes_or_images_is_refused(tmp_path):
    json_file = tmp_path / "instances.json"
    categories = [{"id": 9, "name": "dog"}, {"id": 4, "name": "cat"}]
    dataset = {"images": [{"id": 1}], "categories": categories, "annotations": []}
    json_file.write_text(json.dumps(dataset))
    assert json_category_ids(str(json_file), ["cat", "dog"]) == [4, 9]
    with pytest.raises(ValueError, match="instances.json.*categories"):
        json_category_ids(str(json_file), ["dog", "cat"])
    with pytest.raises(ValueError, match="instances.json.*image 2"):
        coco_table([record(1), record(2)], [], ["cat", "dog"], str(json_file))
