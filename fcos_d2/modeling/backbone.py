"""ResNet-FPN with P6 and P7, from Detectron2's builders."""

import math

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import BACKBONE_REGISTRY, build_resnet_backbone
from detectron2.modeling.backbone.fpn import FPN
from detectron2.modeling.backbone.resnet import BottleneckBlock
from fvcore.nn.weight_init import c2_xavier_fill
from torch import Tensor, nn

from .saved_settings import SavedSettings


class TopBlock(nn.Module):
    """Levels above the FPN, each a 3x3 convolution of stride 2 on the level below.

    For P6 and P7 it equals Detectron2's ``LastLevelP6P7``, which is limited to these two.
    """

    def __init__(self, in_channels: int, out_channels: int, in_feature: str, levels: list[str]):
        """Take the channels of ``in_feature`` and of the levels, and the names of the levels."""
        super().__init__()
        self.in_feature = in_feature
        self.levels = levels
        self.num_levels = len(levels)
        for level in levels:
            conv = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1)
            c2_xavier_fill(conv)
            self.add_module(level, conv)
            in_channels = out_channels

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the levels, finest first, with a ReLU between two convolutions."""
        results: list[Tensor] = []
        for level in self.levels:
            x = self.get_submodule(level)(results[-1].relu() if results else x)
            results.append(x)
        return results


class ResNetFPN(SavedSettings, FPN):
    """Detectron2's ``FPN`` on a ResNet; its state dict holds the ResNet's STRIDE_IN_1X1."""

    saved_settings = ("stride_in_1x1",)

    @property
    def stride_in_1x1(self) -> bool | None:
        """Which convolution of a bottleneck has the stride; None without bottlenecks."""
        strides = [block.conv1.stride[0] for block in self._bottlenecks()]
        return max(strides) > 1 if strides else None

    @stride_in_1x1.setter
    def stride_in_1x1(self, value: bool) -> None:
        for block in self._bottlenecks():
            stride = (block.stride, block.stride)
            block.conv1.stride, block.conv2.stride = (stride, (1, 1)) if value else ((1, 1), stride)

    def _bottlenecks(self) -> list[BottleneckBlock]:
        """Return the bottlenecks that reduce the resolution."""
        blocks = self.get_submodule("bottom_up").modules()
        return [x for x in blocks if isinstance(x, BottleneckBlock) and x.stride > 1]


@BACKBONE_REGISTRY.register()
def build_resnet_fcos_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNetFPN:
    """Build the backbone of FCOS (paper, section 3.2): P3..P5, and P6 and P7 by stride-2 conv.

    Detectron2's ``build_retinanet_resnet_fpn_backbone`` computes P6 from C5 only; here
    ``MODEL.FCOS.TOP_BLOCK_IN_FEATURE`` is "p5" (the default) or "res5". If FPN.IN_FEATURES ends
    with another stage, such as res4, the top block starts with P5 and the key is "p4" or "res4".
    Levels above those in ``MODEL.FCOS.IN_FEATURES`` are not built: an unused layer gets no
    gradient, which DistributedDataParallel does not allow.

    Raises:
        ValueError: the input of the top block is neither the last level of the FPN nor its stage.
    """
    bottom_up = build_resnet_backbone(cfg, input_shape)
    return ResNetFPN(
        bottom_up=bottom_up,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=_build_top_block(cfg, bottom_up.output_shape()),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


def _build_top_block(cfg: CfgNode, bottom_up_shape: dict[str, ShapeSpec]) -> nn.Module | None:
    in_feature = cfg.MODEL.FCOS.TOP_BLOCK_IN_FEATURE
    out_channels = cfg.MODEL.FPN.OUT_CHANNELS
    last_stage = cfg.MODEL.FPN.IN_FEATURES[-1]
    last = int(math.log2(bottom_up_shape[last_stage].stride))
    if in_feature == f"p{last}":
        in_channels = out_channels
    elif in_feature == last_stage:
        in_channels = bottom_up_shape[in_feature].channels
    else:
        raise ValueError(
            f"MODEL.FCOS.TOP_BLOCK_IN_FEATURE is {in_feature!r}: with {last_stage} as the last of "
            f"MODEL.FPN.IN_FEATURES it must be 'p{last}' or {last_stage!r}."
        )
    wanted = [int(x[1:]) for x in cfg.MODEL.FCOS.IN_FEATURES if x[1:].isdecimal()]
    levels = [f"p{level}" for level in range(last + 1, max(wanted, default=last) + 1)]
    return TopBlock(in_channels, out_channels, in_feature, levels) if levels else None
