"""Detectron2's own FCOS: names of its tensors, and its options."""

import importlib.util
import re

import pytest
import torch

from fcos_d2.checkpoint import convert

HEAD = "proposal_generator.head."
PARTS = {
    "cls_subnet": "cls_tower",
    "bbox_subnet": "box_tower",
    "cls_score": "cls_score",
    "bbox_pred": "box_pred",
    "ctrness": "centerness",
}


def translate(name):
    """Return our name for one of theirs."""
    if not name.startswith("head."):
        return name
    _, part, *rest = name.split(".")
    return f"{HEAD}{PARTS[part]}.{'.'.join(rest)}"


def translate_cycle(name):
    """Return our five names where batch norms (index 1 and 4 of a tower) share weight and bias."""
    shared = re.fullmatch(r"head\.(\w+)_subnet\.(1|4)\.(weight|bias)", name)
    if not shared:
        return translate(name)
    tower = {"cls": "cls_tower", "bbox": "box_tower"}[shared[1]]
    return [f"{HEAD}{tower}.{shared[2]}.{level}.{shared[3]}" for level in range(5)]


# (differences of the state dict from the usual one, some of the keys)
CASES = {
    "GroupNorm": ({}, {"MODEL.FCOS.NORM": "GN", "MODEL.FCOS.NUM_CLS_CONVS": 2}),
    "no norm": ({"kind": ""}, {"MODEL.FCOS.NORM": "", "MODEL.FCOS.NUM_CLS_CONVS": 2}),
    "batch norms with one weight and bias": ({"kind": "cycle"}, {"MODEL.FCOS.NORM": "BN"}),
    "P6 from res5, as its shape shows": (
        {"top": (512, 64)},
        {"MODEL.FCOS.TOP_BLOCK_IN_FEATURE": "res5"},
    ),
    "ResNet-50": (
        {"depth": 50},
        {
            "INPUT.FORMAT": "BGR",
            "MODEL.PIXEL_MEAN": [103.53, 116.28, 123.675],
            "MODEL.PIXEL_STD": [1.0, 1.0, 1.0],
            "MODEL.RESNETS.DEPTH": 50,
            "MODEL.RESNETS.STRIDE_IN_1X1": True,
            "MODEL.FPN.OUT_CHANNELS": 64,
            "MODEL.FCOS.LOCATION_OFFSET": 0.5,
            "MODEL.FCOS.LOCATION_STEP": "stride",
            "MODEL.FCOS.TOP_BLOCK_IN_FEATURE": "p5",
            "MODEL.FCOS.SCORE_THRESH_TEST": 0.2,
            "MODEL.FCOS.SCORE_THRESH_ON": "score",
            "MODEL.FCOS.CLIP_BEFORE_NMS": False,
            "MODEL.FCOS.NMS_THRESH_TEST": 0.6,
        },
    ),
    "ResNeXt of FAIR": (
        {"depth": 50, "groups": 32},
        {
            "MODEL.RESNETS.NUM_GROUPS": 32,
            "MODEL.RESNETS.WIDTH_PER_GROUP": 4,
            "MODEL.RESNETS.STRIDE_IN_1X1": False,
            "MODEL.PIXEL_STD": [57.375, 57.12, 58.395],
        },
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_tensors_and_keys(make_state, assert_landed, name):
    differences, keys = CASES[name]
    state = make_state("detectron2", **differences)
    converted = convert(state)
    assert converted.source == "detectron2"
    assert {key: converted.cfg[key] for key in keys} == keys
    is_cycle = differences.get("kind") == "cycle"
    assert_landed(converted, state, translate_cycle if is_cycle else translate)
    (note,) = converted.notes
    assert "STRIDE_IN_1X1" in note


def test_pixel_statistics_and_anchors_of_older_versions(make_state, assert_landed):
    state = {
        **make_state("detectron2"),
        "pixel_mean": torch.tensor([102.9801, 115.9465, 122.7717]).view(3, 1, 1),
        "pixel_std": torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1),
        "anchor_generator.cell_anchors.0": torch.zeros(1, 4),
    }
    converted = convert(state)
    assert converted.cfg["MODEL.PIXEL_MEAN"] == [102.9801, 115.9465, 122.7717]
    assert converted.cfg["MODEL.PIXEL_STD"] == [1.0, 2.0, 3.0]
    no_weight = ("pixel_mean", "pixel_std", "anchor_generator.cell_anchors.0")
    assert_landed(converted, state, lambda name: () if name in no_weight else translate(name))


@pytest.mark.skipif(
    importlib.util.find_spec("detectron2.modeling.meta_arch.fcos") is None,
    reason="this version of Detectron2 has no FCOS of its own",
)
@pytest.mark.parametrize(("norm", "kind"), [("GN", "GN"), ("BN", "cycle"), ("", "")])
def test_the_names_used_here_are_its_own(make_state, norm, kind):
    from detectron2.layers import ShapeSpec
    from detectron2.modeling.meta_arch.fcos import FCOSHead

    with torch.device("meta"):
        head = FCOSHead(
            input_shape=[ShapeSpec(channels=64)] * 5, conv_dims=[64] * 2, norm=norm, num_classes=3
        )
    state = make_state("detectron2", kind=kind)
    made = {k.removeprefix("head."): x.shape for k, x in state.items() if k.startswith("head.")}
    assert made == {k: x.shape for k, x in head.state_dict().items()}


def test_there_is_no_p6_without_p7(make_state):
    state = {k: x for k, x in make_state("detectron2").items() if ".p7." not in k}
    with pytest.raises(ValueError, match=r"missing, top_block \(2\): backbone\.top_block\.p7"):
        convert(state)
