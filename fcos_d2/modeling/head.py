"""The FCOS head: two towers shared over the levels; class logits, box distances, centerness."""

import math

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec, cat, get_norm
from torch import Tensor, nn

from ..config import get_num_classes


class Scale(nn.Module):
    """A learned scalar that multiplies its input."""

    def __init__(self, init: float = 1.0):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(init))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x * scale``."""
        return x * self.scale


def _tower(channels: int, num_convs: int, norm: str) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(num_convs):
        # GroupNorm does not take away a bias that differs inside a group: the bias stays useful.
        layers.append(nn.Conv2d(channels, channels, 3, padding=1))
        if norm:
            layers.append(get_norm(norm, channels))
        layers.append(nn.ReLU())
    return nn.Sequential(*layers)


def _flatten(maps: list[Tensor]) -> Tensor:
    """Join per-level maps (N, C, H_l, W_l) to (N, L, C), finest level first, row by row."""
    return cat([x.flatten(2) for x in maps], dim=2).transpose(1, 2)


class FCOSHead(nn.Module):
    """The head of FCOS (paper, section 3.2 and figure 2), one for all levels."""

    @configurable
    def __init__(
        self,
        *,
        input_shape: list[ShapeSpec],
        num_classes: int,
        num_cls_convs: int = 4,
        num_box_convs: int = 4,
        norm: str = "GN",
        prior_prob: float = 0.01,
        centerness_on_cls: bool = False,
        use_scale: bool = False,
    ):
        """Build the towers and the three predictors.

        Args:
            input_shape: shape of each level's feature map; all have the same channels.
            num_classes: number of foreground classes K.
            num_cls_convs: 3x3 convolutions in the classification tower.
            num_box_convs: 3x3 convolutions in the box tower.
            norm: normalisation in the towers, as :func:`detectron2.layers.get_norm` names it;
                an empty string is none.
            prior_prob: foreground probability that the class bias starts at.
            centerness_on_cls: predict centerness from the classification tower.
            use_scale: multiply each level's regression by a learned scalar.

        Raises:
            ValueError: no class, levels of different channels, or channels that GN can't divide.
        """
        super().__init__()
        channels = _common_channels(input_shape)
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}: FCOS needs at least one class.")
        if norm == "GN" and channels % 32:
            raise ValueError(
                f"GroupNorm has 32 groups, which do not divide {channels} channels: set "
                "MODEL.FPN.OUT_CHANNELS to a multiple of 32, or MODEL.FCOS.NORM to another norm."
            )
        self.cls_tower = _tower(channels, num_cls_convs, norm)
        self.box_tower = _tower(channels, num_box_convs, norm)
        self.cls_score = nn.Conv2d(channels, num_classes, 3, padding=1)
        self.box_pred = nn.Conv2d(channels, 4, 3, padding=1)
        self.centerness = nn.Conv2d(channels, 1, 3, padding=1)
        self.scales = nn.ModuleList(Scale() for _ in input_shape) if use_scale else None
        self.centerness_on_cls = centerness_on_cls

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)
        nn.init.constant_(self.cls_score.bias, -math.log((1 - prior_prob) / prior_prob))

    @classmethod
    def from_config(cls, cfg, input_shape: list[ShapeSpec]) -> dict:
        """Map ``cfg.MODEL.FCOS`` to the constructor's arguments."""
        return {
            "input_shape": input_shape,
            "num_classes": get_num_classes(cfg),
            "num_cls_convs": cfg.MODEL.FCOS.NUM_CLS_CONVS,
            "num_box_convs": cfg.MODEL.FCOS.NUM_BOX_CONVS,
            "norm": cfg.MODEL.FCOS.NORM,
            "prior_prob": cfg.MODEL.FCOS.PRIOR_PROB,
            "centerness_on_cls": cfg.MODEL.FCOS.CENTERNESS_ON_CLS,
            "use_scale": cfg.MODEL.FCOS.USE_SCALE,
        }

    def forward(self, features: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Predict at every location.

        Args:
            features: one (N, C, H_l, W_l) map a level, finest first.

        Returns:
            With L the number of locations of all levels:

            - logits (N, L, K), before the sigmoid.
            - ltrb (N, L, 4), distances to the left, top, right and bottom side in units of the
              location's stride, not negative (ReLU).
            - centerness (N, L), before the sigmoid.
        """
        logits, ltrb, centerness = [], [], []
        for level, feature in enumerate(features):
            cls_tower = self.cls_tower(feature)
            box_tower = self.box_tower(feature)
            regression = self.box_pred(box_tower)
            if self.scales is not None:
                regression = self.scales[level](regression)
            logits.append(self.cls_score(cls_tower))
            ltrb.append(regression.relu())
            centerness.append(self.centerness(cls_tower if self.centerness_on_cls else box_tower))
        return _flatten(logits), _flatten(ltrb), _flatten(centerness).squeeze(2)


def _common_channels(input_shape: list[ShapeSpec]) -> int:
    channels = {shape.channels for shape in input_shape}
    if len(channels) != 1:
        raise ValueError(
            "One head serves all levels, so they need the same number of channels; got "
            f"{[shape.channels for shape in input_shape]}."
        )
    return channels.pop()
