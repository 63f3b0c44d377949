"""Architecture from shapes: the keys of our own models are inferred again."""

import pytest
import torch

from fcos_d2.checkpoint import ARCHITECTURE_KEYS
from fcos_d2.checkpoint.architecture import build_cfg, expected_state, infer_architecture
from fcos_d2.checkpoint.keys import collect_keys, is_setting

BASE = {
    "MODEL.META_ARCHITECTURE": "FCOS",
    "MODEL.BACKBONE.NAME": "build_resnet_fcos_fpn_backbone",
    "MODEL.PROPOSAL_GENERATOR.NAME": "FCOSProposalGenerator",
    "MODEL.RESNETS.DEPTH": 18,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
    "MODEL.RESNETS.OUT_FEATURES": ["res3", "res4", "res5"],
    "MODEL.FPN.IN_FEATURES": ["res3", "res4", "res5"],
    "MODEL.FPN.OUT_CHANNELS": 64,
}
BOTTLENECKS = {"MODEL.RESNETS.RES2_OUT_CHANNELS": 256}
P2 = ["res2", "res3", "res4", "res5"]
CASES = [
    {},
    {"MODEL.RESNETS.DEPTH": 34},
    {"MODEL.RESNETS.DEPTH": 50, **BOTTLENECKS},
    {"MODEL.RESNETS.DEPTH": 101, **BOTTLENECKS},
    {"MODEL.RESNETS.DEPTH": 152, **BOTTLENECKS},
    {
        "MODEL.RESNETS.DEPTH": 50,
        "MODEL.RESNETS.NUM_GROUPS": 32,
        "MODEL.RESNETS.WIDTH_PER_GROUP": 4,
        **BOTTLENECKS,
    },
    {"MODEL.RESNETS.STEM_OUT_CHANNELS": 32, "MODEL.RESNETS.NORM": "GN"},
    {"MODEL.FPN.NORM": "GN", "MODEL.FPN.OUT_CHANNELS": 96},
    {"MODEL.FCOS.TOP_BLOCK_IN_FEATURE": "res5"},
    {"MODEL.FCOS.NUM_SHARED_CONVS": 3, "MODEL.FCOS.NUM_CLS_CONVS": 0, "MODEL.FCOS.NORM": "BN"},
    {"MODEL.FCOS.NORM": "", "MODEL.FCOS.NUM_CLS_CONVS": 1, "MODEL.FCOS.NUM_BOX_CONVS": 2},
    {
        "MODEL.FCOS.USE_SCALE": True,
        "MODEL.FCOS.IN_FEATURES": ["p3", "p4", "p5", "p6"],
        "MODEL.FCOS.SIZES_OF_INTEREST": [64, 128, 256],
    },
    {"MODEL.FCOS.IN_FEATURES": ["p3", "p4", "p5"], "MODEL.FCOS.SIZES_OF_INTEREST": [64, 128]},
    {
        "MODEL.RESNETS.OUT_FEATURES": P2,
        "MODEL.FPN.IN_FEATURES": P2,
        "MODEL.FCOS.IN_FEATURES": ["p2", "p3", "p4", "p5", "p6", "p7"],
        "MODEL.FCOS.SIZES_OF_INTEREST": [32, 64, 128, 256, 512],
    },
]


def infer(state):
    shapes = {name: tuple(x.shape) for name, x in state.items()}
    return infer_architecture(shapes.get)


@pytest.mark.parametrize("keys", CASES)
def test_keys_of_our_own_models(keys):
    cfg = build_cfg({**BASE, **keys}, num_classes=3)
    wanted = collect_keys(cfg, (*ARCHITECTURE_KEYS, "MODEL.FCOS.TOP_BLOCK_IN_FEATURE"))
    assert infer(expected_state(cfg)) == wanted


@pytest.mark.parametrize(
    "name",
    [
        "backbone.bottom_up.stem.conv1.weight",
        "backbone.bottom_up.stem.conv1.norm.running_mean",
        "backbone.bottom_up.res2.0.conv1.weight",
        "backbone.bottom_up.res2.0.conv1.norm.running_var",
        "backbone.bottom_up.res2.0.conv3.weight",
        "backbone.bottom_up.res4.5.conv1.weight",
        "backbone.fpn_lateral5.weight",
        "backbone.fpn_output4.weight",
        "backbone.fpn_output5.weight",
        "backbone.top_block.p7.weight",
        "proposal_generator.head.cls_tower.0.weight",
        "proposal_generator.head.cls_tower.1.weight",
        "proposal_generator.head.box_tower.3.weight",
        "proposal_generator.head.cls_score.weight",
        "proposal_generator.head.centerness.weight",
        "proposal_generator.head.scales.2.scale",
    ],
)
def test_one_missing_tensor_changes_nothing(name):
    """It is reported as missing then, instead of changing the expected network."""
    keys = {"MODEL.RESNETS.DEPTH": 50, **BOTTLENECKS, "MODEL.FCOS.USE_SCALE": True}
    state = expected_state(build_cfg({**BASE, **keys}, num_classes=3))
    whole = infer(state)
    del state[name]
    assert infer(state) == whole


def test_another_backbone():
    with pytest.raises(ValueError, match="has 0 blocks of two convolutions"):
        infer({"backbone.bottom_up.level2.conv.weight": torch.zeros(1)})


def test_the_expected_state_has_settings_but_no_weights():
    state = expected_state(build_cfg(BASE, num_classes=3))
    assert {x.device.type for name, x in state.items() if not is_setting(name)} == {"meta"}
    assert state["pixel_mean"].flatten().tolist() == pytest.approx([103.53, 116.28, 123.675])
    assert state["proposal_generator.head.cls_score.weight"].shape == (3, 64, 3, 3)
