"""The evaluator: what it collects, gathers, returns, logs and writes."""

import json
import logging
import math
import os

import pytest
import torch
from detectron2.structures import Boxes, Instances

from fcos_d2.evaluation import DetectionEvaluator
from fcos_d2.evaluation.evaluator import ModelInfo

from .conftest import predict, record

NAMES = ["cat", "dog", "cow"]


def make_records():
    """Image 000005 with a cat, a dog and a difficult dog; image 000007 with a cat; one without."""
    objects = {
        "000005": [(0, 0, 0, 10, 10), (1, 20, 20, 60, 60), (1, 70, 0, 90, 20, {"difficult": 1})],
        "000007": [(0, 5, 5, 25, 25)],
        "000009": [],
    }
    return [record(image_id, *items) for image_id, items in objects.items()]


def output(*detections):
    """A model's output of detections (class, x0, y0, x1, y1, score)."""
    table = torch.tensor(detections, dtype=torch.float32).reshape(-1, 6)
    fields = {"scores": table[:, 5], "pred_classes": table[:, 0].long()}
    return {"instances": Instances((200, 200), pred_boxes=Boxes(table[:, 1:5]), **fields)}


def perfect(entry):
    """The output that is the record's ground truth."""
    return output(*((a["category_id"], *a["bbox"], 0.1) for a in entry["annotations"]))


def read(folder):
    """The predictions and the tables that were written."""
    files = (folder / "coco_instances_results.json", folder / "evaluation.json")
    return [json.loads(file.read_text(), parse_constant=pytest.fail) for file in files]


def test_perfect_predictions(tmp_path):
    records = make_records()
    evaluator = DetectionEvaluator("pets", records, NAMES, tmp_path)
    evaluator.reset()
    for entry in reversed(records):
        evaluator.process([entry], [perfect(entry)])
    results = evaluator.evaluate()

    assert list(results) == ["bbox", "voc"]
    bbox, voc = results["bbox"], results["voc"]
    keys = ("AP", "AP50", "AP-cat", "AP-dog", "AR100")
    assert [bbox[key] for key in keys] == pytest.approx([100] * 5)
    assert math.isnan(bbox["AP-cow"]) and math.isnan(voc["AP50_area-cow"])
    keys = ("AP50_11point", "AP50_area", "AP50_11point-cat", "AP50_area-dog")
    assert [voc[key] for key in keys] == pytest.approx([100] * 4)
    assert all(type(value) is float for table in results.values() for value in table.values())

    predictions, report = read(tmp_path)
    assert [p["image_id"] for p in predictions] == ["000005"] * 3 + ["000007"]
    score = torch.tensor(0.1).item()  # the float32, every digit of it
    assert predictions[1] == predict("000005", 1, [20, 20, 40, 40], score)
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
    info = ModelInfo("a.pth", 7, ema=True, optimize="bfloat16")
    model = {"weights": "a.pth", "iteration": 7, "ema": True, "tta": False, "optimize": "bfloat16"}
    for given, written in ((None, None), (info, model)):
        DetectionEvaluator("pets", make_records(), NAMES, tmp_path, model_info=given).evaluate()
        assert read(tmp_path)[1]["model"] == written


def test_a_box_keeps_its_corners(tmp_path):
    """The model's float32 corners come back exactly from the float64 x + width in the file."""
    records = make_records()
    evaluator = DetectionEvaluator("pets", records, NAMES, tmp_path)
    corners = (0.1, 0.7, 91.3, 77.9)
    evaluator.process([records[2]], [output((0, *corners, 0.3))])
    evaluator.evaluate()
    ((x, y, w, h),) = [p["bbox"] for p in read(tmp_path)[0]]
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


def test_an_image_processed_twice_is_an_error_and_one_never_processed_is_empty(caplog):
    records = make_records()
    evaluator = DetectionEvaluator("pets", records, NAMES)
    batch = records[:1], [perfect(records[0])]
    for _ in range(2):
        evaluator.process(*batch)
    with pytest.raises(ValueError, match="'000005'.*processed twice"):
        evaluator.evaluate()
    evaluator.reset()
    evaluator.process(*batch)
    with caplog.at_level(logging.WARNING, logger="fcos_d2"):
        results = evaluator.evaluate()
    # Of the cats one of two is found without a wrong one: VOC's area AP is 1/2.
    assert results["voc"]["AP50_area-cat"] == pytest.approx(50)
    assert "2 of 3 images were not processed" in caplog.text


def test_impossible_predictions_are_refused_at_once():
    records = make_records()
    evaluator = DetectionEvaluator("pets", records, NAMES)
    for entry, detections, message in (
        ({"image_id": "999999"}, [], "image '999999'.*pets"),
        (records[0], [(3, 0, 0, 5, 5, 0.5)], "class id 3.*3 classes.*NUM_CLASSES to 3"),
        (records[0], [(0, 0, 0, math.inf, 5, 0.5)], "'000005' is not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluator.process([entry], [output(*detections)])
    with pytest.raises(ValueError, match="pets.*'000005'"):
        DetectionEvaluator("pets", [*records, records[0]], NAMES)


def test_results_carry_the_category_ids_of_the_json(tmp_path):
    json_file = tmp_path / "instances.json"
    categories = [{"id": 8, "name": "dog"}, {"id": 2, "name": "cat"}]
    items = [{"id": 1, "image_id": 1, "category_id": 8, "bbox": [0, 0, 9, 9]}]
    dataset = {"images": [{"id": 1}], "categories": categories, "annotations": items}
    json_file.write_text(json.dumps(dataset))
    records = [record(1, (1, 0, 0, 9, 9))]
    folder = tmp_path / "out"
    evaluator = DetectionEvaluator("own", records, ["cat", "dog"], folder, str(json_file))
    evaluator.process(records, [perfect(records[0])])
    assert evaluator.evaluate()["bbox"]["AP-dog"] == pytest.approx(100)
    (prediction,), report = read(folder)
    assert prediction["category_id"] == 8 and report["category_ids"] == [2, 8]
