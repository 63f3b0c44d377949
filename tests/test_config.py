"""Recipes and config keys."""

import logging
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.config import get_cfg
from detectron2.modeling import build_model

from fcos_d2 import add_fcos_config
from fcos_d2.checkpoint import FCOSCheckpointer, apply_checkpoint_keys
from fcos_d2.config import (
    REMOVED_KEYS,
    check_training,
    class_nodes,
    get_num_classes,
    set_num_classes,
)
from fcos_d2.engine import load_cfg

RECIPES = sorted((Path(__file__).resolve().parents[1] / "configs").glob("FCOS_*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_builds_its_model(path):
    cfg = get_cfg()
    add_fcos_config(cfg)
    cfg.merge_from_file(str(path))
    cfg.MODEL.DEVICE = "cpu"
    assert cfg.MODEL.FCOS.NUM_CLASSES == -1
    if path.stem == "FCOS_Shapes":
        # Not a data set that Detectron2 knows; its source is registered before it is used.
        cfg.MODEL.FCOS.NUM_CLASSES = 6
    model = build_model(cfg)
    kind = next(x for x in ("VOC", "COCO", "Shapes") if x in path.stem)
    expected = {"VOC": 20, "COCO": 80, "Shapes": 6}[kind]
    assert get_num_classes(cfg) == expected
    assert model.proposal_generator.head.cls_score.out_channels == expected
    assert cfg.SOLVER.REFERENCE_IMS_PER_BATCH == cfg.SOLVER.IMS_PER_BATCH


def values(cfg, prefix=""):
    """``cfg`` as a flat dict ``{"A.B.KEY": value}``."""
    flat = {}
    for name, value in cfg.items():
        flat |= (
            values(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        )
    return flat


def test_adding_the_keys_changes_no_key_of_detectron2():
    cfg = get_cfg()
    before = values(cfg)
    add_fcos_config(cfg)
    after = values(cfg)
    assert len(after) > len(before)
    assert {key: after[key] for key in before} == before


def test_config_of_an_older_run_loads_with_a_warning_per_removed_key(tmp_path, caplog):
    cfg = get_cfg()
    add_fcos_config(cfg)
    add_fcos_config(cfg)  # adding twice is harmless, as with Detectron2's add_*_config functions
    before = cfg.dump()
    old = {"VERSION": 2}
    for key in REMOVED_KEYS:
        *parents, name = key.split(".")
        node = old
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = True
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(old))
    with caplog.at_level(logging.WARNING):
        cfg.merge_from_file(str(tmp_path / "config.yaml"))
        cfg.merge_from_list([x for key in REMOVED_KEYS for x in (key, "True")])
    assert cfg.dump() == before
    for key in REMOVED_KEYS:
        assert caplog.text.count(f"Deprecated config key (ignoring): {key}\n") == 2


# The number of classes and the meta architecture

NAMES = ["ball", "box", "cone"]


@pytest.fixture
def rcnn_cfg(tiny_cfg):
    tiny_cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    tiny_cfg.INPUT.DIFFICULT = tiny_cfg.INPUT.CROWD = "drop"
    return tiny_cfg


def test_number_of_classes_of_one_stage(tiny_cfg):
    """The ROI heads' 80, which Detectron2 has by default, are of no interest."""
    for meta_arch in ("FCOS", "ProposalNetwork"):
        tiny_cfg.MODEL.META_ARCHITECTURE = meta_arch
        tiny_cfg.MODEL.FCOS.NUM_CLASSES = -1
        set_num_classes(tiny_cfg, "some:data", NAMES)
        assert list(class_nodes(tiny_cfg)) == ["MODEL.FCOS"]
        assert tiny_cfg.MODEL.FCOS.NUM_CLASSES == 3
        assert tiny_cfg.MODEL.ROI_HEADS.NUM_CLASSES == 80


def test_number_of_classes_of_roi_heads(rcnn_cfg):
    rcnn_cfg.MODEL.ROI_HEADS.NUM_CLASSES = -1
    set_num_classes(rcnn_cfg, "some:data", NAMES)
    assert list(class_nodes(rcnn_cfg)) == ["MODEL.FCOS", "MODEL.ROI_HEADS"]
    assert [node.NUM_CLASSES for node in class_nodes(rcnn_cfg).values()] == [3, 3]


@pytest.mark.parametrize(
    "node, message",
    [
        ("FCOS", r"MODEL.FCOS.NUM_CLASSES is 5, but some:data has 3 .*cone\): set it to 3, or"),
        ("ROI_HEADS", r"MODEL.ROI_HEADS.NUM_CLASSES is 5, but some:data has 3 .*set it to 3, or"),
    ],
)
def test_another_number_of_classes(rcnn_cfg, node, message):
    rcnn_cfg.MODEL.FCOS.NUM_CLASSES = rcnn_cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3
    rcnn_cfg.MODEL[node].NUM_CLASSES = 5
    with pytest.raises(ValueError, match=message):
        set_num_classes(rcnn_cfg, "some:data", NAMES)


@pytest.mark.parametrize("key", ["DIFFICULT", "CROWD"])
def test_roi_heads_do_not_support_ignored_objects(rcnn_cfg, key):
    check_training(rcnn_cfg)
    rcnn_cfg.INPUT[key] = "ignore"
    with pytest.raises(ValueError, match=f"INPUT.{key} is 'ignore', .*GeneralizedRCNN.*'drop'"):
        check_training(rcnn_cfg)


@pytest.mark.parametrize("key", ["MASK_ON", "KEYPOINT_ON"])
def test_data_for_boxes_only(rcnn_cfg, key):
    rcnn_cfg.MODEL[key] = True
    with pytest.raises(ValueError, match=f"MODEL.{key} is True, .* boxes only"):
        check_training(rcnn_cfg)


@pytest.mark.parametrize("meta_arch", ["FCOS", "ProposalNetwork"])
def test_one_stage_ignores_objects(tiny_cfg, meta_arch):
    tiny_cfg.MODEL.META_ARCHITECTURE = meta_arch
    assert tiny_cfg.INPUT.DIFFICULT == tiny_cfg.INPUT.CROWD == "ignore"
    check_training(tiny_cfg)


# Names of earlier versions

OLD_NAME, NAME = "build_fcos_resnet_fpn_backbone", "build_resnet_fcos_fpn_backbone"


@pytest.fixture
def old_config(tiny_cfg, tmp_path):
    """A config.yaml that names the backbone as earlier versions did."""
    path = tmp_path / "config.yaml"
    path.write_text(tiny_cfg.dump().replace(NAME, OLD_NAME))
    assert OLD_NAME in path.read_text()
    return path


def test_old_backbone_name_in_a_config(old_config):
    assert load_cfg(str(old_config), []).MODEL.BACKBONE.NAME == NAME


def test_old_backbone_name_in_a_config_read_by_detectron2(old_config, tiny_cfg):
    """As a script with ``DefaultPredictor`` does."""
    cfg = get_cfg()
    add_fcos_config(cfg)
    cfg.merge_from_file(str(old_config))
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


def test_old_config_of_a_run_with_a_lazy_config(old_config):
    """MODEL.LAZY held its model as text, which is no longer read."""
    text = old_config.read_text()
    old_config.write_text(text.replace("ARCHITECTURE: FCOS", "ARCHITECTURE: LazyModel"))
    with pytest.raises(ValueError, match="LazyModel: .*earlier version.*lazyconfig_train_net.py"):
        load_cfg(str(old_config), [])
