"""The ResNet-FPN builder."""

import pytest
import torch
from detectron2.modeling import build_backbone
from detectron2.modeling.backbone.fpn import LastLevelP6P7


@pytest.mark.parametrize("in_feature, channels", [("p5", 64), ("res5", 512)])
def test_p6_comes_from(tiny_cfg, in_feature, channels):
    """The 64 channels of res2 double with each stage: res5 has 64 * 8 = 512."""
    tiny_cfg.MODEL.FCOS.TOP_BLOCK_IN_FEATURE = in_feature
    backbone = build_backbone(tiny_cfg)
    assert backbone.top_block.p6.in_channels == channels
    shapes = backbone.output_shape()
    assert {name: shape.stride for name, shape in shapes.items()} == {
        "p3": 8,
        "p4": 16,
        "p5": 32,
        "p6": 64,
        "p7": 128,
    }
    features = backbone(torch.zeros(1, 3, 64, 96))
    assert features["p3"].shape == (1, 64, 8, 12)
    assert features["p7"].shape == (1, 64, 1, 1)


def test_p6_and_p7_are_those_of_detectron2(tiny_cfg):
    """Detectron2's LastLevelP6P7 with the same weights is the reference."""
    block = build_backbone(tiny_cfg).top_block
    reference = LastLevelP6P7(64, 64, "p5")
    reference.load_state_dict(block.state_dict())
    x = torch.randn(2, 64, 9, 7, generator=torch.Generator().manual_seed(0))
    for ours, theirs in zip(block(x), reference(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("in_feature, channels", [("p4", 64), ("res4", 256)])
def test_p5_comes_from(tiny_cfg, in_feature, channels):
    """Without res5 the ResNet ends with res4 (64 * 4 = 256 channels), and P5 is on top."""
    tiny_cfg.MODEL.RESNETS.OUT_FEATURES = tiny_cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4"]
    tiny_cfg.MODEL.FCOS.TOP_BLOCK_IN_FEATURE = in_feature
    backbone = build_backbone(tiny_cfg)
    assert not hasattr(backbone.bottom_up, "res5")
    assert backbone.top_block.p5.in_channels == channels
    strides = {name: shape.stride for name, shape in backbone.output_shape().items()}
    assert strides == {"p3": 8, "p4": 16, "p5": 32, "p6": 64, "p7": 128}
    features = backbone(torch.zeros(1, 3, 64, 96))
    assert features["p5"].shape == (1, 64, 2, 3)
    assert features["p7"].shape == (1, 64, 1, 1)


def test_unknown_source_of_p6(tiny_cfg):
    tiny_cfg.MODEL.FCOS.TOP_BLOCK_IN_FEATURE = "res4"
    with pytest.raises(ValueError, match="TOP_BLOCK_IN_FEATURE is 'res4': after the res5"):
        build_backbone(tiny_cfg)


def test_unknown_source_of_p5(tiny_cfg):
    tiny_cfg.MODEL.RESNETS.OUT_FEATURES = tiny_cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4"]
    with pytest.raises(ValueError, match="it has to be 'p4' or 'res4'"):
        build_backbone(tiny_cfg)
