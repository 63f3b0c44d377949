"""`train_net.py --eval-only` in two processes gives the tables of one."""

from pathlib import Path

import pytest
import torch
from detectron2.engine import default_argument_parser
from detectron2.modeling import build_model

from fcos_d2.checkpoint import FCOSCheckpointer
from fcos_d2.data.shapes import SHAPE_CLASSES, make_shapes
from fcos_d2.engine import evaluate, setup

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_two_ranks_give_the_tables_of_one(tiny_cfg, tmp_path, torchrun):
    """Of three images, and of one, where a rank has nothing to do; to the last byte."""
    save_detector(tiny_cfg, tmp_path)
    sources = tuple(f"voc:{make_shapes(tmp_path, 'test', count)}:test" for count in (3, 1))
    options = [
        *("MODEL.WEIGHTS", str(tmp_path / "model.pth"), "DATASETS.TEST", str(sources)),
        *("MODEL.FCOS.NUM_CLS_CONVS", "1", "MODEL.FCOS.NUM_BOX_CONVS", "1"),
        *("MODEL.DEVICE", "cpu", "INPUT.MIN_SIZE_TEST", "96"),
        *("TEST.DETECTIONS_PER_IMAGE", "100", "OUTPUT_DIR"),
    ]
    command = ["--config-file", str(ROOT / "configs" / "FCOS_Shapes.yaml"), "--eval-only"]
    arguments = [*command, *options, str(tmp_path / "one")]
    results = evaluate(setup(default_argument_parser().parse_args(arguments)))
    assert results[sources[0]]["voc"]["AP50_area"] > 0

    text = torchrun(ROOT / "train_net.py", *command, *options, tmp_path / "two")
    assert "World size: 2" in text and "not processed" not in text
    one, two = (read_files(tmp_path / name / "inference") for name in ("one", "two"))
    assert one == two and len(one) == 4


def save_detector(cfg, folder):
    """Save a model that was never trained, but finds boxes in every image."""
    cfg.MODEL.FCOS.NUM_CLASSES = len(SHAPE_CLASSES)
    model = build_model(cfg)
    head = model.proposal_generator.head
    torch.nn.init.normal_(head.cls_score.weight, std=0.1)
    torch.nn.init.constant_(head.cls_score.bias, 0.0)
    torch.nn.init.constant_(head.box_pred.bias, 1.5)
    FCOSCheckpointer(model, str(folder), class_names=SHAPE_CLASSES).save("model")


def read_files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.glob("*/*.json")}
