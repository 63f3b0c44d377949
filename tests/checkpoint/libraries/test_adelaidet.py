"""AdelaiDet's FCOS: names of its tensors, and its options."""

import numpy as np
import pytest
import torch

from fcos_d2.checkpoint import convert

THEIRS, OURS = "proposal_generator.fcos_head.", "proposal_generator.head."
PARTS = {
    "share_tower": "share_tower",
    "cls_tower": "cls_tower",
    "bbox_tower": "box_tower",
    "cls_logits": "cls_score",
    "bbox_pred": "box_pred",
    "ctrness": "centerness",
    "scales": "scales",
}


def translate(name):
    if name.startswith("backbone.bottom_up.") and name.endswith("num_batches_tracked"):
        return ()
    if not name.startswith(THEIRS):
        return name
    part, _, rest = name.removeprefix(THEIRS).partition(".")
    return f"{OURS}{PARTS[part]}.{rest}"


# (differences of the state dict from the usual one, some of the keys)
CASES = {
    "usual": (
        {"depth": 50},
        {
            "INPUT.FORMAT": "BGR",
            "MODEL.PIXEL_MEAN": [103.53, 116.28, 123.675],
            "MODEL.PIXEL_STD": [1.0, 1.0, 1.0],
            "MODEL.RESNETS.STRIDE_IN_1X1": True,
            "MODEL.FCOS.USE_SCALE": True,
            "MODEL.FCOS.BOX_ACTIVATION": "relu",
            "MODEL.FCOS.CENTERNESS_ON_CLS": False,
            "MODEL.FCOS.SCORE": "sqrt",
            "MODEL.FCOS.SCORE_THRESH_TEST": 0.05,
            "MODEL.FCOS.SCORE_THRESH_ON": "cls",
            "MODEL.FCOS.TOPK_ON": "score",
            "MODEL.FCOS.CLIP_BEFORE_NMS": False,
            "MODEL.FCOS.NMS_THRESH_TEST": 0.6,
        },
    ),
    # Three levels, shared towers, batch norms with statistics per level.
    "real-time": (
        {"convs": (4, 0, 0), "kind": "BN", "levels": 3, "resnet_norm": "BN"},
        {
            "MODEL.FCOS.IN_FEATURES": ["p3", "p4", "p5"],
            "MODEL.FCOS.SIZES_OF_INTEREST": [64, 128],
            "MODEL.FCOS.NUM_SHARED_CONVS": 4,
            "MODEL.FCOS.NUM_CLS_CONVS": 0,
            "MODEL.FCOS.NUM_BOX_CONVS": 0,
            "MODEL.FCOS.NORM": "BN",
            "MODEL.RESNETS.NORM": "FrozenBN",  # predicts the same
        },
    ),
    "four levels": ({"levels": 4}, {"MODEL.FCOS.IN_FEATURES": ["p3", "p4", "p5", "p6"]}),
    "no norm": (
        {"kind": "", "convs": (1, 2, 3)},
        {"MODEL.FCOS.NORM": "", "MODEL.FCOS.NUM_BOX_CONVS": 3},
    ),
    # TOP_LEVELS 0, 1 and 2 with USE_SCALE False.
    **{
        f"{levels} levels without scales": (
            {"levels": levels, "has_scales": False},
            {
                "MODEL.FCOS.USE_SCALE": False,
                "MODEL.FCOS.IN_FEATURES": [f"p{n}" for n in range(3, 3 + levels)],
            },
        )
        for levels in (3, 4, 5)
    },
}


@pytest.mark.parametrize("name", CASES)
def test_tensors_and_keys(make_state, assert_landed, name):
    differences, keys = CASES[name]
    state = make_state("adelaidet", **differences)
    converted = convert(state)
    assert converted.source == "adelaidet"
    assert {key: converted.cfg[key] for key in keys} == keys
    assert_landed(converted, state, translate)


def test_scales_and_remarks(make_state):
    converted = convert(make_state("adelaidet"))
    assert converted.weights[f"{OURS}scales.4.scale"].shape == ()  # there it has length 1
    assert "STRIDE_IN_1X1" in converted.notes[0]
    for option in ("SCORE_THRESH_ON score", "SCORE_THRESH_TEST 0.2236"):
        assert f"MODEL.FCOS.{option}" in converted.notes[1]
    for option in ("BOX_LOSS_WEIGHT centerness", "QUALITY iou"):
        assert f"MODEL.FCOS.{option}" in converted.notes[1]


@pytest.mark.parametrize("end", ["weight", "bias"])
def test_half_of_p7_shows_that_it_existed(make_state, end):
    state = make_state("adelaidet", has_scales=False)
    del state[f"backbone.top_block.p7.{end}"]
    with pytest.raises(ValueError, match=rf"missing, top_block \(1\): backbone.top_block.p7.{end}"):
        convert(state)


def test_numpy_arrays(make_state, assert_landed):
    """As in Detectron2's model zoo; one is a NumPy scalar."""
    state = make_state("adelaidet")
    arrays = {name: x.numpy() for name, x in state.items()}
    arrays[f"{THEIRS}scales.0.scale"] = np.float32(state[f"{THEIRS}scales.0.scale"].item())
    converted = convert({"model": arrays, "__author__": "somebody"})
    assert all(isinstance(x, torch.Tensor) for x in converted.weights.values())
    assert_landed(converted, state, translate)


def test_a_backbone_that_is_not_a_resnet(make_state):
    """The names of its DLA."""
    state = {
        name.replace("bottom_up.res", "bottom_up.level"): x
        for name, x in make_state("adelaidet").items()
    }
    with pytest.raises(ValueError, match="its backbone is not a ResNet-18.*where res4 is expected"):
        convert(state)


def test_deformable_convolutions_are_refused(make_state):
    state = make_state("adelaidet")
    state[f"{THEIRS}cls_tower.3.offset.weight"] = torch.zeros(18, 64, 3, 3)
    with pytest.raises(ValueError, match=r"deformable.*cls_tower\.3\.offset\.weight"):
        convert(state)


def test_tensors_of_other_heads_are_left_over(make_state):
    state = {**make_state("adelaidet"), "mask_branch.tower.0.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"left over, mask_branch\.tower \(1\): mask_branch"):
        convert(state)
    assert (
        convert(state, partial=True).weights.keys()
        == convert(make_state("adelaidet")).weights.keys()
    )
