"""Keys that are stored with weights."""

import pytest

from fcos_d2.checkpoint import ARCHITECTURE_KEYS, CARRIED_KEYS, FACT_KEYS, TEST_KEYS, parse_keys
from fcos_d2.checkpoint.keys import collect_keys, set_keys


def test_every_key_is_in_one_group_and_in_the_config(tiny_cfg):
    assert len(set(CARRIED_KEYS)) == len(CARRIED_KEYS)
    assert set(CARRIED_KEYS) == {*FACT_KEYS, *ARCHITECTURE_KEYS, *TEST_KEYS}
    assert collect_keys(tiny_cfg, CARRIED_KEYS).keys() == set(CARRIED_KEYS)


def test_all_keys_of_fcos_but_those_of_training_are_stored(tiny_cfg):
    """A new key in MODEL.FCOS must be listed here or in keys.py."""
    only_training = {
        "NUM_CLASSES",  # goes with the class names
        "PRIOR_PROB",
        "CENTER_SAMPLING_RADIUS",
        "FOCAL_LOSS_ALPHA",
        "FOCAL_LOSS_GAMMA",
        "BOX_LOSS",
        "BOX_LOSS_WEIGHT",
    }
    carried = {k.removeprefix("MODEL.FCOS.") for k in CARRIED_KEYS if k.startswith("MODEL.FCOS.")}
    assert carried | only_training == set(tiny_cfg.MODEL.FCOS)


def test_collected_keys_can_be_set_again(tiny_cfg):
    tiny_cfg.MODEL.FCOS.NORM = ""
    tiny_cfg.MODEL.FCOS.IN_FEATURES = ["p3", "p4"]
    other = tiny_cfg.clone()
    other.MODEL.FCOS.NORM, other.MODEL.FCOS.IN_FEATURES = "BN", ["p5"]
    other.MODEL.RESNETS.DEPTH, other.INPUT.FORMAT = 101, "RGB"
    set_keys(other, collect_keys(tiny_cfg, CARRIED_KEYS))
    assert other == tiny_cfg


def test_pairs_of_a_command_line():
    options = ["MODEL.FCOS.BOX_ACTIVATION", "relu", "MODEL.PIXEL_STD", "[1.0, 2.0, 3.0]"]
    assert parse_keys(options) == {
        "MODEL.FCOS.BOX_ACTIVATION": "relu",
        "MODEL.PIXEL_STD": [1.0, 2.0, 3.0],
    }
    assert parse_keys([]) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["MODEL.FCOS.SCORE"], "MODEL.FCOS.SCORE has no value"),
        (["SOLVER.BASE_LR", "1"], "SOLVER.BASE_LR: not stored with weights.*MODEL.FCOS.SCORE"),
        (["MODEL.FCOS.NMS_THRESH_TEST", "high"], "Type mismatch"),
    ],
)
def test_bad_pairs(options, message):
    with pytest.raises(ValueError, match=message):
        parse_keys(options)
