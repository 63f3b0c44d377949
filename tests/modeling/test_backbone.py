"""The ResNet-FPN builder."""

import pytest
import torch
from detectron2.modeling import build_backbone


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


def test_unknown_source_of_p6(tiny_cfg):
    tiny_cfg.MODEL.FCOS.TOP_BLOCK_IN_FEATURE = "res4"
    with pytest.raises(ValueError, match="TOP_BLOCK_IN_FEATURE is 'res4'"):
        build_backbone(tiny_cfg)
