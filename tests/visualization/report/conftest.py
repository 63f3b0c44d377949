"""Output folders of runs, made without training."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, Instances

from fcos_d2 import add_fcos_config
from fcos_d2.data import class_names, load_records
from fcos_d2.data.boxes import box_xywh
from fcos_d2.data.shapes import make_shapes
from fcos_d2.evaluation import DetectionEvaluator
from fcos_d2.files import dataset_slug

ROOT = Path(__file__).resolve().parents[3]
HOSTILE_CLASS = '<b id="injected">&"cat\''
HOSTILE_IMAGE = '<i id="injected">'


@pytest.fixture(scope="session")
def shapes_source(tmp_path_factory):
    """Name of a VOC folder with twelve generated images."""
    return f"voc:{make_shapes(str(tmp_path_factory.mktemp('data')), 'report', 12)}:report"


@pytest.fixture(scope="session")
def hostile_source(tmp_path_factory, write_voc):
    """Name of a VOC folder whose image and class names are HTML."""
    voc = write_voc(tmp_path_factory.mktemp("hostile"))
    voc.add(HOSTILE_IMAGE, [(HOSTILE_CLASS, "11 11 50 40")], image_size=(80, 60))
    (voc.path / "classes.txt").write_text(f"{HOSTILE_CLASS}\n")
    voc.add_split("test", f"{HOSTILE_IMAGE}\n")
    return voc.source("test")


@pytest.fixture(scope="session")
def make_run():
    """Make an output folder: ``make_run(folder, sources, model_info=None)``."""
    return _make_run


@pytest.fixture(scope="session")
def shapes_run(shapes_source, tmp_path_factory):
    return _make_run(tmp_path_factory.mktemp("original") / "run", [shapes_source])


@pytest.fixture
def run(shapes_run, tmp_path):
    """A copy of an output folder with one test set, to be modified by a test."""
    return Path(shutil.copytree(shapes_run, tmp_path / "run"))


@pytest.fixture
def results(run):
    """Folder of the evaluation in ``run``."""
    return next((run / "inference").iterdir())


def _make_run(folder, sources, model_info=None):
    """Config, metrics, checkpoint and the results of :func:`_predict` on each source."""
    folder.mkdir(exist_ok=True)
    cfg = get_cfg()
    add_fcos_config(cfg)
    cfg.merge_from_file(str(ROOT / "configs" / "FCOS_Shapes.yaml"))
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = tuple(sources[:1]), tuple(sources)
    (folder / "config.yaml").write_text(cfg.dump())
    lines = [
        {"iteration": i, "total_loss": 3 / i, "loss_cls": 2 / i, "lr": 0.01, "fcos/num_pos": 90.0}
        for i in range(20, 420, 20)
    ]
    lines.append({"iteration": 400, "bbox/AP": 41.0, "bbox/AP50": 70.0})
    (folder / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "model_final.pth").write_bytes(b"weights")
    for source in sources:
        records, names = load_records(source), class_names(source)
        place = folder / "inference" / dataset_slug(source)
        json_file = MetadataCatalog.get(source).get("json_file")
        evaluator = DetectionEvaluator(
            source, records, names, place, json_file, model_info=model_info
        )
        for record in records:
            evaluator.process([record], [{"instances": _predict(record, len(names))}])
        evaluator.evaluate()
    return folder


def _predict(record, num_classes):
    """Most objects slightly shifted; every fourth with a wrong class, every fifth missed."""
    boxes, classes = [[1.0, 1.0, 9.0, 9.0]], [0]  # on background
    for i, item in enumerate(record["annotations"]):
        x, y, width, height = box_xywh(item)
        if i % 5 != 4:
            boxes.append([x + 1, y, x + width, y + height])
            classes.append((item["category_id"] + (i % 4 == 3)) % num_classes)
    instances = Instances((record["height"], record["width"]))
    instances.pred_boxes = Boxes(torch.tensor(boxes))
    instances.scores = torch.tensor(np.linspace(0.2, 0.95, len(boxes)))
    instances.pred_classes = torch.tensor(classes)
    return instances
