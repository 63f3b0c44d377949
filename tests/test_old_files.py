"""Configs and checkpoints of earlier versions still load."""

from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model

from fcos_d2 import add_fcos_config
from fcos_d2.checkpoint import FCOSCheckpointer, apply_checkpoint_keys
from fcos_d2.engine import load_cfg

OLD_NAME, NAME = "build_fcos_resnet_fpn_backbone", "build_resnet_fcos_fpn_backbone"


@pytest.fixture
def old_config(tiny_cfg, tmp_path):
    """A config.yaml as an earlier version wrote it."""
    path = tmp_path / "config.yaml"
    path.write_text(tiny_cfg.dump().replace(NAME, OLD_NAME))
    assert OLD_NAME in path.read_text()
    return str(path)


def test_old_backbone_name_in_a_config(old_config):
    assert load_cfg(old_config, []).MODEL.BACKBONE.NAME == NAME


def test_old_backbone_name_in_a_config_read_by_detectron2(old_config, tiny_cfg):
    """As a script with ``DefaultPredictor`` does."""
    cfg = get_cfg()
    add_fcos_config(cfg)
    cfg.merge_from_file(old_config)
    cfg.freeze()
    assert repr(build_model(cfg)) == repr(build_model(tiny_cfg))
    assert cfg.MODEL.BACKBONE.NAME == OLD_NAME


def test_old_backbone_name_in_a_checkpoint(tiny_cfg, tmp_path):
    FCOSCheckpointer(build_model(tiny_cfg), str(tmp_path), cfg=tiny_cfg).save("a")
    path = tmp_path / "a.pth"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["cfg"]["MODEL.BACKBONE.NAME"] = OLD_NAME
    torch.save(checkpoint, path)
    cfg = tiny_cfg.clone()
    cfg.MODEL.FCOS.NUM_CLS_CONVS = 4
    apply_checkpoint_keys(cfg, str(path), training=False)
    assert cfg == tiny_cfg
    FCOSCheckpointer(build_model(cfg), for_inference=True).load(str(path))


def test_config_of_a_run_with_a_lazy_model(old_config):
    """MODEL.LAZY held its model as text, which is no longer read."""
    path = Path(old_config)
    path.write_text(
        path.read_text().replace("META_ARCHITECTURE: FCOS", "META_ARCHITECTURE: LazyModel")
    )
    with pytest.raises(ValueError, match="LazyModel: .*earlier version.*lazyconfig_train_net.py"):
        load_cfg(old_config, [])
