"""Detectron2's recall of proposals on cases whose recall is known."""

import json
import pickle

import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, Instances

from fcos_d2.evaluation.proposals import ProposalEvaluator

from .conftest import record

# Image 000005 of 100 x 80 pixels has two objects and a difficult one, 000007 one and a crowd.
WANTED = [[[10, 10, 40, 50], [50, 10, 90, 60]], [[20, 5, 80, 70]]]
IGNORED = [(0, 1, 1, 8, 8, {"difficult": 1})], [(0, 0, 0, 99, 79, {"iscrowd": 1})]


def make_records(*ids):
    rows = zip(ids, WANTED, IGNORED, strict=True)
    return [record(name, *((0, *box) for box in boxes), *other) for name, boxes, other in rows]


RECORDS = make_records("000005", "000007")


def measure(evaluator, boxes_of_images, records=RECORDS):
    """Feed proposals, best first, in batches of one image, and evaluate."""
    evaluator.reset()
    for entry, boxes in zip(records, boxes_of_images, strict=True):
        boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
        proposals = Instances((80, 100), proposal_boxes=Boxes(boxes))
        proposals.objectness_logits = torch.arange(len(boxes), 0, -1).float()
        evaluator.process([entry], [{"proposals": proposals}])
    return evaluator.evaluate()["box_proposals"]


@pytest.fixture
def evaluator(tmp_path):
    return ProposalEvaluator("voc:data/a:train", RECORDS, tmp_path / "out")


def test_proposals_that_are_the_ground_truth(evaluator):
    """The difficult object and the crowd are not proposed, and not missed."""
    table = measure(evaluator, WANTED)
    assert table["AR@100"] == table["AR@1000"] == 100
    # 30 x 40 is a medium object, as are the others; none is small or large.
    assert table["ARm@100"] == 100
    assert table["ARs@100"] != table["ARs@100"] and table["ARl@100"] != table["ARl@100"]


def test_a_recall_computed_by_hand(evaluator):
    """Of three objects one is found exactly, one with IoU 0.625, one not at all.

    Thresholds 0.50, 0.55, 0.60 are below 0.625, the other seven are not:
    (3 * 2/3 + 7 * 1/3) / 10 = 0.4333.
    """
    # 40 x 50 against 25 x 50 within it: 25 / 40.
    table = measure(evaluator, [[[10, 10, 40, 50], [50, 10, 75, 60]], [[0, 71, 9, 79]]])
    assert table["AR@100"] == pytest.approx(100 * 13 / 30, abs=1e-3)


def test_the_limit_of_proposals(evaluator):
    """150 proposals of background in front: found among 1000, not among 100."""
    background = [[95, 75, 99, 79]] * 150
    table = measure(evaluator, [background + WANTED[0], background + WANTED[1]])
    assert table["AR@100"] == 0
    assert table["AR@1000"] == 100


def test_what_is_written(evaluator, tmp_path):
    """The ids of box_proposals.pkl are those of ground_truth.json."""
    measure(evaluator, WANTED)
    truth = json.loads((tmp_path / "out" / "ground_truth.json").read_text())
    with open(tmp_path / "out" / "box_proposals.pkl", "rb") as file:
        proposals = pickle.load(file)
    images = [{"id": 1, "file_name": "000005.jpg"}, {"id": 2, "file_name": "000007.jpg"}]
    assert truth["images"] == images
    assert proposals["ids"] == [1, 2]
    assert proposals["boxes"][1].tolist() == WANTED[1]


def test_a_second_run_in_one_process(evaluator, tmp_path):
    """Other data under the same name, and in the same folder: measured on what it is now."""
    assert measure(evaluator, WANTED)["AR@100"] == 100
    for folder in ("out", "other"):
        again = ProposalEvaluator("voc:data/a:train", RECORDS[:1], tmp_path / folder)
        assert measure(again, [WANTED[0][:1]], RECORDS[:1])["AR@100"] == 50


def test_a_data_set_with_a_coco_file(tmp_path):
    """Its own file is the ground truth, its own areas decide on sizes, and none is written."""
    json_file = tmp_path / "truth.json"
    images = [{"id": 31, "file_name": "000005.jpg"}, {"id": 7, "file_name": "000007.jpg"}]
    annotations = [
        {"id": 1, "image_id": 31, "bbox": [10, 10, 30, 40], "area": 900, "iscrowd": 0},
        {"id": 2, "image_id": 31, "bbox": [50, 10, 40, 50], "area": 2000, "iscrowd": 0},
        {"id": 3, "image_id": 7, "bbox": [20, 5, 60, 65], "area": 3900, "iscrowd": 0},
    ]
    annotations = [{**item, "category_id": 1} for item in annotations]
    truth = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "a"}]}
    json_file.write_text(json.dumps(truth))
    name = f"coco:{json_file}:images"
    MetadataCatalog.get(name).json_file = str(json_file)
    records = make_records(31, 7)
    evaluator = ProposalEvaluator(name, records, tmp_path / "out", str(json_file))
    # The small object, by its area of 900, is the one that is not found.
    table = measure(evaluator, [WANTED[0][1:], WANTED[1]], records)
    assert table["AR@100"] == pytest.approx(100 * 2 / 3)
    assert table["ARs@100"] == 0 and table["ARm@100"] == 100
    assert not (tmp_path / "out" / "ground_truth.json").exists()
