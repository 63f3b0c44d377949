"""The evaluator: what it collects, gathers, returns, logs and writes."""

import json
import logging
import math
import os

import pytest
import torch
from detectron2.structures import Boxes, BoxMode, Instances

from fcos_d2.evaluation import DetectionEvaluator
from fcos_d2.evaluation.evaluator import ModelInfo

NAMES = ["cat", "dog", "cow"]


def make_records():
    """Image 000005 with a cat, a dog and a difficult dog; image 000007 with a cat; one without."""
    objects = {
        "000005": [(0, 0, 0, 10, 10, 0), (1, 20, 20, 60, 60, 0), (1, 70, 0, 90, 20, 1)],
        "000007": [(0, 5, 5, 25, 25, 0)],
        "000009": [],
    }
    return [
        {
            "file_name": f"{image_id}.jpg",
            "image_id": image_id,
            "height": 100,
            "width": 100,
            "annotations": [
                {
                    "bbox": list(box),
                    "bbox_mode": BoxMode.XYXY_ABS,
                    "category_id": category,
                    "iscrowd": 0,
                    "difficult": difficult,
                }
                for category, *box, difficult in items
            ],
        }
        for image_id, items in objects.items()
    ]


def output(*detections):
    """A model's output of detections (class, x0, y0, x1, y1, score)."""
    table = torch.tensor(detections, dtype=torch.float32).reshape(-1, 6)
    instances = Instances((100, 100))
    instances.pred_boxes = Boxes(table[:, 1:5])
    instances.scores = table[:, 5]
    instances.pred_classes = table[:, 0].long()
    return {"instances": instances}


def perfect(record):
    """The output that is the record's ground truth."""
    return output(*((a["category_id"], *a["bbox"], 0.1) for a in record["annotations"]))


def test_perfect_predictions(tmp_path):
    records = make_records()
    evaluator = DetectionEvaluator("pets", records, NAMES, tmp_path)
    evaluator.reset()
    for record in reversed(records):
        evaluator.process([record], [perfect(record)])
    results = evaluator.evaluate()

    assert list(results) == ["bbox", "voc"]
    bbox, voc = results["bbox"], results["voc"]
    for value in (bbox["AP"], bbox["AP50"], bbox["AP-cat"], bbox["AP-dog"], bbox["AR100"]):
        assert value == pytest.approx(100)
    assert math.isnan(bbox["AP-cow"]) and math.isnan(voc["AP50_area-cow"])
    for key in ("AP50_11point", "AP50_area", "AP50_11point-cat", "AP50_area-dog"):
        assert voc[key] == pytest.approx(100)
    assert all(type(value) is float for table in results.values() for value in table.values())

    predictions = json.loads((tmp_path / "coco_instances_results.json").read_text())
    assert [p["image_id"] for p in predictions] == ["000005"] * 3 + ["000007"]
    score = torch.tensor(0.1).item()  # the float32, every digit of it
    box = [20.0, 20.0, 40.0, 40.0]
    assert predictions[1] == {
        "image_id": "000005",
        "category_id": 1,
        "bbox": box,
        "score": score,
    }

    report = json.loads((tmp_path / "evaluation.json").read_text(), parse_constant=pytest.fail)
    assert report["dataset"] == "pets" and report["class_names"] == NAMES
    counts = ("num_images", "num_processed_images", "num_ground_truth", "num_ignored")
    assert [report[key] for key in counts] == [3, 3, 3, 1]
    assert report["num_predictions"] == 4
    assert report["bbox"]["AP"] == pytest.approx(100) and report["bbox"]["APl"] is None
    dog = report["per_class"][1]
    assert (dog["name"], dog["num_ground_truth"], dog["num_ignored"]) == ("dog", 1, 1)
    assert dog["AP50_area"] == pytest.approx(100)
    assert sorted(os.listdir(tmp_path)) == ["coco_instances_results.json", "evaluation.json"]


def test_the_tables_say_what_was_evaluated(tmp_path):
    written = []
    for info in (None, ModelInfo("a.pth", 7, ema=True, optimize="bfloat16")):
        DetectionEvaluator("pets", make_records(), NAMES, tmp_path, model_info=info).evaluate()
        written.append(json.loads((tmp_path / "evaluation.json").read_text())["model"])
    assert written[0] is None
    assert written[1] == {
        "weights": "a.pth",
        "iteration": 7,
        "ema": True,
        "tta": False,
        "optimize": "bfloat16",
    }


def test_a_box_keeps_its_corners(tmp_path):
    """The model's float32 corners come back exactly from the float64 x + width in the file."""
    records = make_records()
    evaluator = DetectionEvaluator("pets", records, NAMES, tmp_path)
    corners = (0.1, 0.7, 91.3, 77.9)
    evaluator.process([records[2]], [output((0, *corners, 0.3))])
    evaluator.evaluate()
    ((x, y, w, h),) = [
        p["bbox"] for p in json.loads((tmp_path / "coco_instances_results.json").read_text())
    ]
    assert (x, y, x + w, y + h) == tuple(torch.tensor(corners).tolist())


def test_no_predictions_and_no_folder(caplog):
    records = make_records()
    evaluator = DetectionEvaluator("pets", records, NAMES)
    evaluator.process(records, [output() for _ in records])
    with caplog.at_level(logging.INFO, logger="fcos_d2"):
        results = evaluator.evaluate()
    assert results["bbox"]["AP"] == 0 and results["voc"]["AP50_area"] == 0
    text = caplog.text
    assert "0.50:0.95" in text and "VOC AP50, 11-point" in text and "| cow" in text
    assert "not processed" not in text


def test_images_that_were_not_processed_count_as_empty(caplog):
    """Of the cats one of two is found without a wrong one: VOC's area AP is 1/2."""
    records = make_records()
    evaluator = DetectionEvaluator("pets", records, NAMES)
    evaluator.process([records[0]], [perfect(records[0])])
    with caplog.at_level(logging.WARNING, logger="fcos_d2"):
        results = evaluator.evaluate()
    assert results["voc"]["AP50_area-cat"] == pytest.approx(50)
    assert "2 of 3 images were not processed" in caplog.text


def test_an_image_processed_twice_is_an_error():
    records = make_records()
    evaluator = DetectionEvaluator("pets", records, NAMES)
    for _ in range(2):
        evaluator.process([records[0]], [perfect(records[0])])
    with pytest.raises(ValueError, match="'000005'.*processed twice"):
        evaluator.evaluate()
    evaluator.reset()
    evaluator.process([records[0]], [perfect(records[0])])
    evaluator.evaluate()


def test_impossible_predictions_are_refused_at_once():
    records = make_records()
    evaluator = DetectionEvaluator("pets", records, NAMES)
    with pytest.raises(ValueError, match="image '999999'.*pets"):
        evaluator.process([{"image_id": "999999"}], [output()])
    with pytest.raises(ValueError, match="class id 3.*3 classes.*NUM_CLASSES to 3"):
        evaluator.process([records[0]], [output((3, 0, 0, 5, 5, 0.5))])
    with pytest.raises(ValueError, match="'000005' is not finite"):
        evaluator.process([records[0]], [output((0, 0, 0, math.inf, 5, 0.5))])


def test_two_records_of_one_image_are_refused():
    records = make_records()
    with pytest.raises(ValueError, match="pets.*'000005'"):
        DetectionEvaluator("pets", [*records, records[0]], NAMES)


def test_results_carry_the_category_ids_of_the_json(tmp_path):
    json_file = tmp_path / "instances.json"
    dataset = {
        "images": [{"id": 1}],
        "categories": [{"id": 8, "name": "dog"}, {"id": 2, "name": "cat"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 8, "bbox": [0, 0, 9, 9]}],
    }
    json_file.write_text(json.dumps(dataset))
    annotation = {"bbox": [0, 0, 9, 9], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 1}
    records = [{"image_id": 1, "annotations": [annotation]}]
    names = ["cat", "dog"]
    evaluator = DetectionEvaluator("own", records, names, tmp_path / "out", str(json_file))
    evaluator.process([records[0]], [output((1, 0, 0, 9, 9, 0.5))])
    assert evaluator.evaluate()["bbox"]["AP-dog"] == pytest.approx(100)
    (prediction,) = json.loads((tmp_path / "out" / "coco_instances_results.json").read_text())
    assert prediction["category_id"] == 8
    report = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert report["category_ids"] == [2, 8]
