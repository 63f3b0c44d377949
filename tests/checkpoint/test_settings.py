"""Settings of a checkpoint in Detectron2's own predictor and in ours."""

import logging
import pickle

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from torchvision.models.detection import fcos_resnet50_fpn

from fcos_d2.checkpoint import (
    FACT_KEYS,
    TEST_KEYS,
    FCOSCheckpointer,
    apply_checkpoint_keys,
    convert_file,
    read_info,
)
from fcos_d2.checkpoint.keys import collect_keys, state_facts
from fcos_d2.engine import load_cfg
from fcos_d2.engine.ema import ModelEma
from fcos_d2.engine.predict import Predictor

from ..conftest import ROOT


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """torchvision's own ResNet-50 FCOS with random weights that detect, converted."""
    torch.manual_seed(0)
    model = fcos_resnet50_fpn(weights=None, weights_backbone=None, num_classes=5)
    torch.nn.init.normal_(model.head.classification_head.cls_logits.weight, std=0.05)
    torch.nn.init.constant_(model.head.classification_head.cls_logits.bias, -2.0)
    torch.nn.init.uniform_(model.head.regression_head.bbox_reg.bias, 0.5, 2.0)
    folder = tmp_path_factory.mktemp("settings")
    torch.save(model.state_dict(), folder / "theirs.pth")
    convert_file(folder / "theirs.pth", folder / "converted.pth")
    return str(folder / "converted.pth")


@pytest.fixture
def cfg(path):
    cfg = load_cfg(str(ROOT / "configs" / "FCOS_R50_COCO.yaml"), ["MODEL.DEVICE", "cpu"])
    cfg.MODEL.WEIGHTS, cfg.MODEL.FCOS.NUM_CLASSES = path, 5
    cfg.INPUT.MIN_SIZE_TEST = 200
    return cfg


def carried(path):
    return {k: v for k, v in read_info(path).cfg.items() if k in FACT_KEYS}


@pytest.mark.parametrize("order", ["BGR", "RGB"])
def test_detectron2s_predictor_detects_the_same(cfg, path, order):
    """Built from the recipe, whose facts all differ; thresholds are the recipe's in both."""
    cfg.INPUT.FORMAT = order
    recipe = collect_keys(cfg, FACT_KEYS)
    image = np.random.default_rng(0).integers(0, 256, (150, 210, 3), dtype=np.uint8)
    ours = Predictor(cfg, keep=TEST_KEYS)
    theirs = DefaultPredictor(cfg)
    assert sum(recipe[key] != value for key, value in carried(path).items()) == 5 + (order == "BGR")
    assert theirs.model.backbone.stride_in_1x1 is False
    one, other = ours(image)["instances"], theirs(image)["instances"]
    assert len(one) == 100 and len(set(one.pred_classes.tolist())) > 1
    for name in ("scores", "pred_classes"):
        assert torch.equal(one.get(name), other.get(name))
    assert torch.equal(one.pred_boxes.tensor, other.pred_boxes.tensor)


def test_a_file_that_holds_a_state_dict_alone(cfg, path, tmp_path):
    """Our tools read the settings that torch.save(model.state_dict()) writes."""
    model = build_model(cfg)
    DetectionCheckpointer(model).load(path)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    wanted = carried(path)
    del wanted["MODEL.FCOS.TOP_BLOCK_IN_FEATURE"]
    assert read_info(str(tmp_path / "a.pth")).cfg == wanted
    apply_checkpoint_keys(cfg, str(tmp_path / "a.pth"), training=True)
    assert collect_keys(cfg, wanted) == wanted


def test_a_config_overrides_the_settings_with_a_warning(cfg, path, caplog):
    model = build_model(cfg)
    before = state_facts(model.state_dict())
    with caplog.at_level(logging.WARNING, logger="fcos_d2"):
        FCOSCheckpointer(model, cfg=cfg, for_inference=True).load(path)
    assert state_facts(model.state_dict()) == before
    (record,) = caplog.records
    assert f"{path}:\n" in record.message and record.message.count("\n") == 6
    assert "\n  MODEL.FCOS.LOCATION_OFFSET 0.5 (checkpoint: 0.0)" in record.message
    caplog.clear()
    FCOSCheckpointer(model, for_inference=True).load(path)  # without a config
    assert state_facts(model.state_dict()).items() <= carried(path).items()
    assert not caplog.records


def test_a_key_set_by_hand_wins(cfg, path):
    predictor = Predictor(cfg, keep=["MODEL.FCOS.LOCATION_OFFSET", "INPUT.FORMAT"])
    facts = state_facts(predictor.model.state_dict())
    assert facts["MODEL.FCOS.LOCATION_OFFSET"] == 0.5 and facts["INPUT.FORMAT"] == "BGR"
    assert facts["MODEL.FCOS.LOCATION_STEP"] == "image"


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
def test_an_older_checkpoint_misses_nothing(cfg, path, tmp_path, suffix, caplog):
    """Without settings in the file, the model keeps those of its config, without a warning."""
    state = torch.load(path, weights_only=True)["model"]
    state = {k: x for k, x in state.items() if "_extra_state" not in k and "pixel" not in k}
    old = tmp_path / f"old{suffix}"
    if suffix == ".pth":
        torch.save({"model": state}, old)
    else:
        arrays = {k: x.numpy() for k, x in state.items()}
        old.write_bytes(pickle.dumps({"model": arrays, "__author__": "somebody"}))
    model = build_model(cfg)
    before = state_facts(model.state_dict())
    with caplog.at_level(logging.WARNING):
        DetectionCheckpointer(model).load(str(old))
        FCOSCheckpointer(model, for_inference=True).load(str(old))
    assert state_facts(model.state_dict()) == before and not caplog.records


def test_an_average_of_weights_is_saved_with_the_loaded_settings(cfg, path, tmp_path):
    model = build_model(cfg)
    ema = ModelEma(model, 0.9)
    checkpointer = FCOSCheckpointer(model, str(tmp_path), get_weights=ema.weights)
    checkpointer.load(path)
    ema.reset()
    ema.update()
    checkpointer.save("average")
    facts = state_facts(torch.load(tmp_path / "average.pth", weights_only=True)["model"])
    assert facts.items() <= carried(path).items() and len(facts) == len(FACT_KEYS) - 1
