"""Recipes and config keys."""

import logging
from pathlib import Path

import pytest
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model

from fcos_d2 import add_fcos_config
from fcos_d2.config import REMOVED_KEYS, get_num_classes

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
    removed = [key for key in REMOVED_KEYS if key in cfg.__dict__[CfgNode.DEPRECATED_KEYS]]
    old = {"VERSION": 2}
    for key in removed:
        *parents, name = key.split(".")
        node = old
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = True
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(old))
    with caplog.at_level(logging.WARNING):
        cfg.merge_from_file(str(tmp_path / "config.yaml"))
        cfg.merge_from_list([x for key in removed for x in (key, "True")])
    assert cfg.dump() == before
    for key in removed:
        assert caplog.text.count(f"Deprecated config key (ignoring): {key}\n") == 2
