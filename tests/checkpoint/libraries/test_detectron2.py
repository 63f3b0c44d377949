"""Detectron2 main's FCOS: where its tensors go, and its options."""

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
    """Our names for one of theirs; a weight that the levels share has five."""
    if not name.startswith("head."):
        return name
    _, part, *rest = name.split(".")
    return f"{HEAD}{PARTS[part]}.{'.'.join(rest)}"


def translate_cycle(name):
    """The same with batch norms: index 1, 4, ... of a tower has one weight and bias together."""
    shared = re.fullmatch(r"head\.(\w+)_subnet\.(1|4)\.(weight|bias)", name)
    if not shared:
        return translate(name)
    tower = {"cls": "cls_tower", "bbox": "box_tower"}[shared[1]]
    return [f"{HEAD}{tower}.{shared[2]}.{level}.{shared[3]}" for level in range(5)]


@pytest.mark.parametrize("kind", ["GN", ""])
def test_each_tensor_goes_to_its_place(make_state, assert_landed, kind):
    state = make_state("detectron2", kind=kind)
    converted = convert(state)
    assert converted.source == "detectron2"
    assert converted.cfg["MODEL.FCOS.NORM"] == kind
    assert converted.cfg["MODEL.FCOS.NUM_CLS_CONVS"] == 2
    assert_landed(converted, state, translate)
    (note,) = converted.notes
    assert "STRIDE_IN_1X1" in note


def test_batch_norms_of_levels_share_weight_and_bias(make_state, assert_landed):
    state = make_state("detectron2", kind="cycle")
    converted = convert(state)
    assert converted.cfg["MODEL.FCOS.NORM"] == "BN"
    assert_landed(converted, state, translate_cycle)


def test_its_options(make_state):
    cfg = convert(make_state("detectron2", depth=50)).cfg
    wanted = {
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
    }
    assert {key: cfg[key] for key in wanted} == wanted


def test_p6_from_res5_shows_in_its_shape(make_state, assert_landed):
    state = make_state("detectron2", top=(512, 64))
    converted = convert(state)
    assert converted.cfg["MODEL.FCOS.TOP_BLOCK_IN_FEATURE"] == "res5"
    assert_landed(converted, state, translate)


def test_what_older_versions_saved_beside_weights(make_state, assert_landed):
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


def test_resnext_is_fairs(make_state, assert_landed):
    state = make_state("detectron2", depth=50, groups=32)
    converted = convert(state)
    wanted = {
        "MODEL.RESNETS.NUM_GROUPS": 32,
        "MODEL.RESNETS.WIDTH_PER_GROUP": 4,
        "MODEL.RESNETS.STRIDE_IN_1X1": False,
        "MODEL.PIXEL_STD": [57.375, 57.12, 58.395],
    }
    assert {key: converted.cfg[key] for key in wanted} == wanted
    assert_landed(converted, state, translate)


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
