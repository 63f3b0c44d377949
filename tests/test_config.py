"""The recipes and the keys."""

from pathlib import Path

import pytest
from detectron2.config import get_cfg
from detectron2.modeling import build_model

from fcos_d2 import add_fcos_config
from fcos_d2.config import get_num_classes

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


def test_adding_the_keys_changes_no_key_of_detectron2():
    before, after = get_cfg(), get_cfg()
    add_fcos_config(after)
    del after.MODEL["FCOS"], after.MODEL["LAZY"], after.MODEL["CHANNELS_LAST"]
    del after.SOLVER["REFERENCE_IMS_PER_BATCH"], after.SOLVER.AMP["PRECISION"]
    del after.INPUT["DIFFICULT"], after.INPUT["CROWD"], after.DATASETS["SKIP_BAD_BOXES"]
    del after.INPUT["COLOR_JITTER"]
    del after.INPUT["REDUCED_JPEG_TRAIN"], after.INPUT["REDUCED_JPEG_TEST"]
    del after.TEST["OPTIMIZE"], after.TEST["COMPILE"]
    del after.TEST["BEST_METRIC"], after.TEST["EARLY_STOP_PATIENCE"], after["MODEL_EMA"]
    assert before.dump() == after.dump()
