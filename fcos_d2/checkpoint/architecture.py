"""Architecture of a network, inferred from the names and shapes of its tensors."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from torch import Tensor

from .. import modeling  # noqa: F401  (registers what build_model builds)
from ..config import add_fcos_config
from .keys import set_keys

# Returns the shape of a tensor by its name in our model; None if it does not exist.
ShapeOf = Callable[[str], tuple[int, ...] | None]

_RESNET = "backbone.bottom_up"
_HEAD = "proposal_generator.head"
_TOWERS = {
    "share_tower": "MODEL.FCOS.NUM_SHARED_CONVS",
    "cls_tower": "MODEL.FCOS.NUM_CLS_CONVS",
    "box_tower": "MODEL.FCOS.NUM_BOX_CONVS",
}
# (has bottlenecks, blocks of res4): depth
_DEPTHS = {(False, 2): 18, (False, 6): 34, (True, 6): 50, (True, 23): 101, (True, 36): 152}
_MAX_BLOCKS = 64  # of a stage or a tower: more than any has


def infer_architecture(shape_of: ShapeOf, fewest_top_levels: int = 2) -> dict[str, Any]:
    """Return the values of the ``ARCHITECTURE_KEYS`` and TOP_BLOCK_IN_FEATURE.

    A value that missing tensors would show is the usual one.

    Args:
        shape_of: see :data:`ShapeOf`.
        fewest_top_levels: number of P6 and P7 that a network with any of them has at least.

    Raises:
        ValueError: the network is not a ResNet-FPN.
    """
    fpn_levels = _fpn_levels(shape_of)
    levels = [*fpn_levels, *_top_levels(shape_of, len(fpn_levels), fewest_top_levels)]
    in_features = [f"res{n}" for n in fpn_levels]
    channels = _size(_first_shape(shape_of, "backbone.fpn_output{}.weight", fpn_levels), 0, 256)
    top_channels = _size(shape_of("backbone.top_block.p6.weight"), 1, channels)
    return {
        "MODEL.META_ARCHITECTURE": "FCOS",
        "MODEL.BACKBONE.NAME": "build_resnet_fcos_fpn_backbone",
        "MODEL.PROPOSAL_GENERATOR.NAME": "FCOSProposalGenerator",
        **_infer_resnet(shape_of),
        "MODEL.RESNETS.OUT_FEATURES": in_features,
        "MODEL.FPN.IN_FEATURES": in_features,
        "MODEL.FPN.OUT_CHANNELS": channels,
        "MODEL.FPN.NORM": _frozen_norm(shape_of, [f"backbone.fpn_output{n}" for n in fpn_levels]),
        "MODEL.FPN.FUSE_TYPE": "sum",
        "MODEL.FCOS.TOP_BLOCK_IN_FEATURE": "p5" if top_channels == channels else "res5",
        "MODEL.FCOS.IN_FEATURES": [f"p{n}" for n in levels],
        "MODEL.FCOS.SIZES_OF_INTEREST": [8 * 2**n for n in levels[:-1]],
        **_infer_head(shape_of),
    }


def build_cfg(keys: Mapping[str, Any], num_classes: int) -> CfgNode:
    """Return the default config with ``keys`` and the number of classes set."""
    cfg = get_cfg()
    add_fcos_config(cfg)
    set_keys(cfg, keys)
    cfg.MODEL.FCOS.NUM_CLASSES = num_classes
    return cfg


def expected_state(cfg: CfgNode) -> dict[str, Tensor]:
    """Return the state dict of the model of ``cfg``: settings, and weights without values.

    Raises:
        ValueError: the model can't be built.
    """
    cfg = cfg.clone()
    cfg.MODEL.DEVICE = "meta"
    try:
        with torch.device("meta"):
            state = build_model(cfg).state_dict()
    except (AssertionError, KeyError) as error:  # Detectron2's errors for an unknown value
        raise ValueError(f"the network of its keys can't be built: {error!r}") from error
    statistics = {"pixel_mean": cfg.MODEL.PIXEL_MEAN, "pixel_std": cfg.MODEL.PIXEL_STD}
    return {**state, **{k: torch.tensor(v).view(-1, 1, 1) for k, v in statistics.items()}}


def _infer_resnet(shape_of: ShapeOf) -> dict[str, Any]:
    stages = [f"{_RESNET}.res{n}.0" for n in range(2, 6)]
    has_bottlenecks = any(shape_of(f"{stage}.conv3.weight") is not None for stage in stages)
    blocks = 1 + max(_last(shape_of, f"{_RESNET}.res4.{{}}.conv{n}.weight") for n in (1, 2))
    if (has_bottlenecks, blocks) not in _DEPTHS:
        kind = "three" if has_bottlenecks else "two"
        raise ValueError(
            "its backbone is not a ResNet-18, -34, -50, -101 or -152 with an FPN: where res4 is "
            f"expected it has {blocks} blocks of {kind} convolutions."
        )
    # A 3x3 convolution of a bottleneck is (groups * width, width, 3, 3).
    inner = shape_of(f"{stages[0]}.conv2.weight") if has_bottlenecks else None
    width = _size(inner, 1, 64)
    outer = shape_of(f"{stages[0]}.conv{3 if has_bottlenecks else 2}.weight")
    return {
        "MODEL.RESNETS.DEPTH": _DEPTHS[has_bottlenecks, blocks],
        "MODEL.RESNETS.STEM_OUT_CHANNELS": _size(shape_of(f"{_RESNET}.stem.conv1.weight"), 0, 64),
        "MODEL.RESNETS.RES2_OUT_CHANNELS": _size(outer, 0, 256 if has_bottlenecks else 64),
        "MODEL.RESNETS.NUM_GROUPS": _size(inner, 0, width) // width,
        "MODEL.RESNETS.WIDTH_PER_GROUP": width,
        "MODEL.RESNETS.NORM": _frozen_norm(shape_of, [f"{stage}.conv1" for stage in stages]),
    }


def _infer_head(shape_of: ShapeOf) -> dict[str, Any]:
    norm = _head_norm(shape_of)
    modules_per_conv = 3 if norm else 2
    keys: dict[str, Any] = {}
    for tower, key in _TOWERS.items():
        indices = range(0, _MAX_BLOCKS, modules_per_conv)
        convs = [i for i in indices if len(shape_of(f"{_HEAD}.{tower}.{i}.weight") or ()) == 4]
        keys[key] = convs[-1] // modules_per_conv + 1 if convs else 0
    has_quality = _first_shape(shape_of, f"{_HEAD}.centerness.{{}}", ("weight", "bias")) is not None
    return {
        **keys,
        "MODEL.FCOS.NORM": norm,
        "MODEL.FCOS.USE_SCALE": _last(shape_of, f"{_HEAD}.scales.{{}}.scale") >= 0,
        "MODEL.FCOS.QUALITY": "centerness" if has_quality else "none",
        "MODEL.FCOS.CLASS_AGNOSTIC": False,
    }


def _head_norm(shape_of: ShapeOf) -> str:
    first_norms = [f"{_HEAD}.{tower}.1" for tower in _TOWERS]
    if any(shape_of(f"{norm}.0.running_mean") is not None for norm in first_norms):
        return "BN"
    if any(len(shape_of(f"{norm}.weight") or ()) == 1 for norm in first_norms):
        return "GN"
    return ""


def _fpn_levels(shape_of: ShapeOf) -> list[int]:
    """Return the levels of the FPN's outputs, up to 5; from 3 if no tensor shows them."""
    present = [n for n in range(2, 6) if shape_of(f"backbone.fpn_output{n}.weight") is not None]
    return list(range(min(present, default=3), 6))


def _top_levels(shape_of: ShapeOf, num_fpn_levels: int, fewest: int) -> list[int]:
    """Return the levels above the FPN, of 6 and 7: as many as scales show, or else P6 and P7."""
    num_scales = _last(shape_of, f"{_HEAD}.scales.{{}}.scale") + 1
    if num_scales:
        return [6, 7][: max(0, num_scales - num_fpn_levels)]
    last = max(_last(shape_of, f"backbone.top_block.p{{}}.{end}") for end in ("weight", "bias"))
    return [] if last < 6 else [6, 7][: max(fewest, last - 5)]


def _frozen_norm(shape_of: ShapeOf, convs: list[str]) -> str:
    """Return the norm after convolutions outside the head.

    A state dict does not show whether batch norms were frozen; predictions are the same.
    """
    if _first_shape(shape_of, "{}.norm.running_mean", convs) is not None:
        return "FrozenBN"
    return "GN" if _first_shape(shape_of, "{}.norm.weight", convs) is not None else ""


def _first_shape(
    shape_of: ShapeOf, pattern: str, values: Iterable[object]
) -> tuple[int, ...] | None:
    shapes = (shape_of(pattern.format(value)) for value in values)
    return next((shape for shape in shapes if shape is not None), None)


def _last(shape_of: ShapeOf, pattern: str) -> int:
    """Return the largest number for which the tensor exists; -1 if none does."""
    found = [i for i in range(_MAX_BLOCKS) if shape_of(pattern.format(i)) is not None]
    return found[-1] if found else -1


def _size(shape: tuple[int, ...] | None, axis: int, default: int) -> int:
    return default if shape is None or len(shape) <= axis else shape[axis]
