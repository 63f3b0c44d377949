"""ResNet-FPN with P6 and P7, out of Detectron2's own builders."""

from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import BACKBONE_REGISTRY, build_resnet_backbone
from detectron2.modeling.backbone.fpn import FPN, LastLevelP6P7
from fvcore.nn.weight_init import c2_xavier_fill
from torch import Tensor, nn


class LastLevelP6(nn.Module):
    """Detectron2's ``LastLevelP6P7`` without P7."""

    num_levels = 1

    def __init__(self, in_channels: int, out_channels: int, in_feature: str = "p5"):
        """Take the channels of ``in_feature`` and those of the other levels."""
        super().__init__()
        self.in_feature = in_feature
        self.p6 = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1)
        c2_xavier_fill(self.p6)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return [P6]."""
        return [self.p6(x)]


@BACKBONE_REGISTRY.register()
def build_fcos_resnet_fpn_backbone(cfg, input_shape: ShapeSpec) -> FPN:
    """Build the backbone of FCOS (paper, section 3.2): P3..P5, then P6 and P7 by stride-2 conv.

    Detectron2's ``build_retinanet_resnet_fpn_backbone`` computes P6 from C5 only; here
    ``MODEL.FCOS.TOP_BLOCK_IN_FEATURE`` is "p5" (the default) or "res5". Of P6 and P7 those are
    built that ``MODEL.FCOS.IN_FEATURES`` needs: a layer that nothing uses gets no gradient, which
    DistributedDataParallel does not allow.

    Raises:
        ValueError: the top block's input is neither "p5" nor a stage in RESNETS.OUT_FEATURES.
    """
    bottom_up = build_resnet_backbone(cfg, input_shape)
    return FPN(
        bottom_up=bottom_up,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=_build_top_block(cfg, bottom_up.output_shape()),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


def _build_top_block(cfg, bottom_up_shape: dict[str, ShapeSpec]) -> nn.Module | None:
    in_feature = cfg.MODEL.FCOS.TOP_BLOCK_IN_FEATURE
    out_channels = cfg.MODEL.FPN.OUT_CHANNELS
    if in_feature == "p5":
        in_channels = out_channels
    elif in_feature == "res5" and in_feature in bottom_up_shape:
        in_channels = bottom_up_shape[in_feature].channels
    else:
        raise ValueError(
            f"MODEL.FCOS.TOP_BLOCK_IN_FEATURE is {in_feature!r}: it has to be 'p5', or 'res5' "
            f"when that is in MODEL.RESNETS.OUT_FEATURES ({cfg.MODEL.RESNETS.OUT_FEATURES})."
        )
    if "p7" in cfg.MODEL.FCOS.IN_FEATURES:
        return LastLevelP6P7(in_channels, out_channels, in_feature)
    if "p6" in cfg.MODEL.FCOS.IN_FEATURES:
        return LastLevelP6(in_channels, out_channels, in_feature)
    return None
