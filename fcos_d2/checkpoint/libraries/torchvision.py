"""``torchvision.models.detection.fcos``; see the package's docstring."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torchvision.models.detection import FCOS_ResNet50_FPN_Weights

from ..resnet import FPN_NAME, count_blocks, torchvision_resnet_name

FEWEST_TOP_LEVELS = 2

_HEAD = {
    "cls_tower": "classification_head.conv",
    "cls_score": "classification_head.cls_logits",
    "box_tower": "regression_head.conv",
    "box_pred": "regression_head.bbox_reg",
    "centerness": "regression_head.bbox_ctrness",
}
_FPN_BLOCKS = {"lateral": "inner_blocks", "output": "layer_blocks"}


def recognise(names: Iterable[str]) -> bool:
    return any(name.startswith("head.regression_head.bbox_ctrness.") for name in names)


def rename(name: str, state: Mapping[str, Tensor]) -> str:
    if name.startswith("backbone.bottom_up."):
        return "backbone.body." + torchvision_resnet_name(name.removeprefix("backbone.bottom_up."))
    if name.startswith("backbone.top_block."):
        return name.replace("backbone.top_block.", "backbone.fpn.extra_blocks.")
    fpn = FPN_NAME.fullmatch(name)
    if fpn:
        kind, level, norm, rest = fpn.groups()
        blocks = f"backbone.fpn.{_FPN_BLOCKS[kind]}"  # from the finest level to level 5
        block = f"{blocks}.{int(level) - 6 + count_blocks(blocks, state)}"
        if norm:
            return f"{block}.1.{rest}"
        without_norm = f"{block}.{rest}"  # before its FPN supported norms
        return without_norm if without_norm in state else f"{block}.0.{rest}"
    part, _, rest = name.removeprefix("proposal_generator.head.").partition(".")
    return f"head.{_HEAD.get(part, part)}.{rest}"


def options(
    checkpoint: Mapping[str, Any], state: Mapping[str, Tensor], architecture: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    # From fcos_resnet50_fpn.
    keys = {
        # ImageNet's statistics of images in 0..1, here for 0..255.
        "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
        "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
        "INPUT.FORMAT": "RGB",
        "MODEL.RESNETS.STRIDE_IN_1X1": False,
        # Anchors are centred at multiples of (padded image size) // (map size).
        "MODEL.FCOS.LOCATION_OFFSET": 0.0,
        "MODEL.FCOS.LOCATION_STEP": "image",
        "MODEL.FCOS.SCORE_THRESH_TEST": 0.2,
    }
    return keys, []


def class_names(checkpoint: Mapping[str, Any], num_outputs: int) -> list[str]:
    coco = FCOS_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    return list(coco) if num_outputs == len(coco) else []
