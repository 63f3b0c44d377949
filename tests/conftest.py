"""Fixtures that several tests share."""

from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode, get_cfg

from fcos_d2 import add_fcos_config

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def tiny_cfg() -> CfgNode:
    """A full FCOS with a ResNet-18 and a narrow head, for 3 classes."""
    cfg = get_cfg()
    add_fcos_config(cfg)
    cfg.merge_from_file(str(ROOT / "configs" / "FCOS_Shapes.yaml"))
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.FCOS.NUM_CLASSES = 3
    cfg.MODEL.FCOS.NUM_CLS_CONVS = 1
    cfg.MODEL.FCOS.NUM_BOX_CONVS = 1
    cfg.DATALOADER.NUM_WORKERS = 0
    return cfg
