"""`FCOSHead`: class logits, box distances and quality from towers shared by all levels."""

import math

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec, cat, get_norm
from torch import Tensor, nn

from ..config import check_option, get_num_classes
from .saved_settings import SavedSettings


class Scale(nn.Module):
    """A learned scalar that multiplies its input."""

    def __init__(self, init: float = 1.0):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(init))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x * scale``."""
        return x * self.scale


BOX_ACTIVATIONS = ("relu", "exp")
QUALITIES = ("centerness", "iou", "none")


class _Tower(nn.ModuleList):
    """Repeated convolution, norm and ReLU; a ``ModuleList`` holds one norm per level."""

    def forward(self, x: Tensor, level: int) -> Tensor:
        for module in self:
            x = module[level](x) if isinstance(module, nn.ModuleList) else module(x)
        return x


def _tower(channels: int, num_convs: int, norm: str, num_levels: int) -> _Tower:
    layers: list[nn.Module] = []
    for _ in range(num_convs):
        # The bias is useful despite GroupNorm, which only removes the mean over a whole group.
        layers.append(nn.Conv2d(channels, channels, 3, padding=1))
        if "BN" in norm:
            # Levels share the convolutions, but their outputs differ in statistics.
            layers.append(nn.ModuleList(get_norm(norm, channels) for _ in range(num_levels)))
        elif norm:
            layers.append(get_norm(norm, channels))
        layers.append(nn.ReLU())
    return _Tower(layers)


def _flatten(maps: list[Tensor]) -> Tensor:
    """Join per-level maps (N, C, H_l, W_l) to (N, L, C), finest level first, row by row.

    Each map is copied in its memory format, channels first or last, without a permutation.
    """
    if maps[0].is_contiguous(memory_format=torch.channels_last):
        return cat([x.permute(0, 2, 3, 1).flatten(1, 2) for x in maps], dim=1)
    return cat([x.flatten(2) for x in maps], dim=2).transpose(1, 2)


class FCOSHead(SavedSettings):
    """Head of FCOS (paper, section 3.2 and figure 2), shared by all levels."""

    saved_settings = ("box_activation", "centerness_on_cls")

    @configurable
    def __init__(
        self,
        *,
        input_shape: list[ShapeSpec],
        num_classes: int,
        num_shared_convs: int = 0,
        num_cls_convs: int = 4,
        num_box_convs: int = 4,
        norm: str = "GN",
        prior_prob: float = 0.01,
        quality: str = "centerness",
        centerness_on_cls: bool = False,
        box_activation: str = "relu",
        use_scale: bool = False,
    ):
        """Build the towers and the three predictors.

        Args:
            input_shape: channels and stride per level; all levels have the same channels.
            num_classes: number of foreground classes K.
            num_shared_convs: 3x3 convolutions shared by both towers.
            num_cls_convs: 3x3 convolutions in the classification tower.
            num_box_convs: 3x3 convolutions in the box tower.
            norm: normalization in the towers, a name of :func:`detectron2.layers.get_norm`; empty
                for none. There is one BatchNorm per level.
            prior_prob: initial foreground probability, set through the class bias.
            quality: target of the quality branch, "centerness" or "iou"; "none" omits the branch.
            centerness_on_cls: predict the quality from the classification tower.
            box_activation: "relu" gives distances in strides, "exp" in pixels.
            use_scale: multiply each level's regression by a learned scalar.

        Raises:
            ValueError: no class, levels of different channels, channels that are not divisible for
                GN, or an unknown option.
        """
        super().__init__()
        channels = _common_channels(input_shape)
        if num_classes < 1:
            raise ValueError(
                f"MODEL.FCOS.NUM_CLASSES is {num_classes}: FCOS needs at least one class."
            )
        if norm == "GN" and channels % 32:
            raise ValueError(
                f"GroupNorm has 32 groups, but {channels} channels are not a multiple of 32: set "
                "MODEL.FPN.OUT_CHANNELS to a multiple of 32, or MODEL.FCOS.NORM to another norm."
            )
        check_option("MODEL.FCOS.BOX_ACTIVATION", box_activation, BOX_ACTIVATIONS)
        check_option("MODEL.FCOS.QUALITY", quality, QUALITIES)
        num_levels = len(input_shape)
        self.share_tower = _tower(channels, num_shared_convs, norm, num_levels)
        self.cls_tower = _tower(channels, num_cls_convs, norm, num_levels)
        self.box_tower = _tower(channels, num_box_convs, norm, num_levels)
        self.cls_score = nn.Conv2d(channels, num_classes, 3, padding=1)
        self.box_pred = nn.Conv2d(channels, 4, 3, padding=1)
        has_quality = quality != "none"
        self.centerness = nn.Conv2d(channels, 1, 3, padding=1) if has_quality else None
        self.scales = nn.ModuleList(Scale() for _ in input_shape) if use_scale else None
        self.centerness_on_cls = centerness_on_cls
        self.box_activation = box_activation
        self.strides = [shape.stride for shape in input_shape]
        self._initialize(prior_prob)

    def _initialize(self, prior_prob: float) -> None:
        """Draw small random weights, and set the class bias to the prior."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        assert self.cls_score.bias is not None
        nn.init.constant_(self.cls_score.bias, -math.log((1 - prior_prob) / prior_prob))

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: list[ShapeSpec]) -> dict:
        """Map ``cfg.MODEL.FCOS`` to the constructor's arguments."""
        return {
            "input_shape": input_shape,
            "num_classes": get_num_classes(cfg),
            "num_shared_convs": cfg.MODEL.FCOS.NUM_SHARED_CONVS,
            "num_cls_convs": cfg.MODEL.FCOS.NUM_CLS_CONVS,
            "num_box_convs": cfg.MODEL.FCOS.NUM_BOX_CONVS,
            "norm": cfg.MODEL.FCOS.NORM,
            "prior_prob": cfg.MODEL.FCOS.PRIOR_PROB,
            "quality": cfg.MODEL.FCOS.QUALITY,
            "centerness_on_cls": cfg.MODEL.FCOS.CENTERNESS_ON_CLS,
            "box_activation": cfg.MODEL.FCOS.BOX_ACTIVATION,
            "use_scale": cfg.MODEL.FCOS.USE_SCALE,
        }

    def forward(self, features: list[Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Predict at every location.

        Args:
            features: one (N, C, H_l, W_l) map per level, finest first.

        Returns:
            With L the number of locations of all levels:

            - logits (N, L, K), before the sigmoid.
            - ltrb (N, L, 4), distances to the left, top, right and bottom side in units of the
              location's stride, not negative.
            - quality (N, L), before the sigmoid; None without a quality branch.
        """
        logits, ltrb, quality = [], [], []
        for level, feature in enumerate(features):
            feature = self.share_tower(feature, level)
            cls_tower = self.cls_tower(feature, level)
            box_tower = self.box_tower(feature, level)
            logits.append(self.cls_score(cls_tower))
            ltrb.append(self._distances(self.box_pred(box_tower), level))
            if self.centerness is not None:
                quality.append(self.centerness(cls_tower if self.centerness_on_cls else box_tower))
        return _flatten(logits), _flatten(ltrb), _flatten(quality).squeeze(2) if quality else None

    def _distances(self, regression: Tensor, level: int) -> Tensor:
        """Convert one level's regression to distances in strides."""
        if self.scales is not None:
            regression = self.scales[level](regression)
        if self.box_activation == "relu":
            return regression.relu()
        # In float32: in float16 the exponential overflows above 11.
        return regression.float().exp() / self.strides[level]


def _common_channels(input_shape: list[ShapeSpec]) -> int:
    channels = {shape.channels for shape in input_shape}
    if len(channels) != 1:
        raise ValueError(
            "The head is shared by all levels, which must have the same number of channels; got "
            f"{[shape.channels for shape in input_shape]}."
        )
    return channels.pop()
