"""The files of a run that are drawn from its folder, each independent of the others."""

import json
import logging

import pytest
import torch
import yaml
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image

from fcos_d2.data import class_names, load_records, register_source
from fcos_d2.evaluation import DetectionEvaluator
from fcos_d2.files import dataset_slug
from fcos_d2.visualization.report import write_report


@pytest.fixture
def source(make_voc):
    """The name of a VOC folder with two images of one object each."""
    voc = make_voc("data")
    for image_id, name in (("a1", "cat"), ("a2", "dog")):
        voc.add(image_id, [(name, "11 11 50 40")], "gray", image_size=(80, 60))
    voc.add_split("test", "a1\na2\n")
    return voc.source("test")


@pytest.fixture
def run(tmp_path, source):
    """An output folder as training and evaluation leave it."""
    folder = tmp_path / "run"
    folder.mkdir()
    lines = [{"iteration": i, "total_loss": 2.0, "lr": 0.1} for i in (19, 39)]
    (folder / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.yaml").write_text(yaml.safe_dump({"DATASETS": {"TEST": (source,)}}))
    evaluate(source, folder)
    return folder


def evaluate(source, folder, json_file=None):
    """Write the results of a perfect model on ``source``."""
    register_source(source)
    records = load_records(source)
    output_dir = folder / "inference" / dataset_slug(source)
    evaluator = DetectionEvaluator(source, records, class_names(source), output_dir, json_file)
    for record in records:
        boxes = [
            BoxMode.convert(item["bbox"], item["bbox_mode"], BoxMode.XYXY_ABS)
            for item in record["annotations"]
        ]
        instances = Instances((record["height"], record["width"]))
        instances.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32))
        instances.scores = torch.full((len(boxes),), 0.9)
        instances.pred_classes = torch.tensor([a["category_id"] for a in record["annotations"]])
        evaluator.process([record], [{"instances": instances}])
    return evaluator.evaluate()


def test_a_whole_run(run):
    curves, detections, report = write_report(str(run))
    assert report == run / "report.html"
    for picture in (curves, detections):
        with Image.open(picture) as image:
            assert image.format == "PNG"


def test_an_evaluation_alone_has_no_curves(run, caplog):
    (run / "metrics.json").unlink()
    with caplog.at_level(logging.WARNING, logger="fcos_d2"):
        assert write_report(run) == [run / "detections.png", run / "report.html"]
    assert "training_curves.png: metrics.json is missing" in caplog.text


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("coco_instances_results.json", None, "coco_instances_results.json"),
        ("evaluation.json", '{"dataset": ', "evaluation.json is not JSON"),
        (
            "coco_instances_results.json",
            '[{"image_id": "a1", "category_id": 7, "bbox": [0, 0, 1, 1], "score": 1}]',
            "category id 7",
        ),
        ("a1.jpg", None, "a1.jpg"),
    ],
)
def test_what_is_missing_is_said_and_the_rest_drawn(run, caplog, file, content, words):
    (path,) = run.parent.rglob(file)
    path.unlink()
    if content is not None:
        path.write_text(content)
    with caplog.at_level(logging.WARNING, logger="fcos_d2"):
        assert write_report(run)[0] == run / "training_curves.png"
    assert words in caplog.text


def test_two_test_sets(run, source):
    other = source.removesuffix(":test")  # every annotation in the folder
    evaluate(other, run)
    config = {"DATASETS": {"TEST": [source, other]}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    second = run / f"detections_{dataset_slug(other)}.png"
    assert write_report(run)[1:3] == [run / "detections.png", second]
    assert second.is_file()


def test_category_ids_of_a_coco_json(run, make_coco, caplog):
    """The results carry the json's ids 3 and 8; drawn they are classes 0 and 1."""
    image = {"id": 4, "file_name": "a1.jpg", "width": 80, "height": 60}
    box = {"id": 1, "image_id": 4, "category_id": 8, "bbox": [10, 10, 40, 30], "area": 1200}
    categories = [{"id": 3, "name": "cat"}, {"id": 8, "name": "dog"}]
    source = make_coco([image], [{**box, "iscrowd": 0}], categories)
    json_file = source.split(":")[1]
    assert evaluate(source, run, json_file)["bbox"]["AP"] == pytest.approx(100)
    (run / "config.yaml").write_text(yaml.safe_dump({"DATASETS": {"TEST": [source]}}))
    assert run / "detections.png" in write_report(run)
    assert "not drawn" not in caplog.text
