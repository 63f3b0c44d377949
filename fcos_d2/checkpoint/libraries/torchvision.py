"""``torchvision.models.detection.fcos``."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torchvision.models.detection import FCOS_ResNet50_FPN_Weights

from ..resnet import torchvision_resnet_name

FEWEST_TOP_LEVELS = 2

_HEAD = {
    "cls_tower": "classification_head.conv",
    "cls_score": "classification_head.cls_logits",
    "box_tower": "regression_head.conv",
    "box_pred": "regression_head.bbox_reg",
    "centerness": "regression_head.bbox_ctrness",
}
_FPN = re.compile(r"backbone\.fpn_(lateral|output)(\d)\.(norm\.)?(\w+)")
_FPN_BLOCKS = {"lateral": "inner_blocks", "output": "layer_blocks"}


def recognise(names: Iterable[str]) -> bool:
    """See :mod:`fcos_d2.checkpoint.libraries`. (RetinaNet there has no centerness.)"""
    return any(name.startswith("head.regression_head.bbox_ctrness.") for name in names)


def rename(name: str, state: Mapping[str, Tensor]) -> str:
    """See :mod:`fcos_d2.checkpoint.libraries`."""
    if name.startswith("backbone.bottom_up."):
        return "backbone.body." + torchvision_resnet_name(name.removeprefix("backbone.bottom_up."))
    if name.startswith("backbone.top_block."):
        return name.replace("backbone.top_block.", "backbone.fpn.extra_blocks.")
    fpn = _FPN.fullmatch(name)
    if fpn:
        kind, level, norm, rest = fpn.groups()
        # The blocks are counted from the finest level on; the last one is of level 5.
        blocks = f"backbone.fpn.{_FPN_BLOCKS[kind]}"
        number = int(level) - 6 + _count_blocks(blocks, state)
        if norm:
            return f"{blocks}.{number}.1.{rest}"
        older = f"{blocks}.{number}.{rest}"  # before FPNs there could have norms
        return older if older in state else f"{blocks}.{number}.0.{rest}"
    part, _, rest = name.removeprefix("proposal_generator.head.").partition(".")
    return f"head.{_HEAD.get(part, part)}.{rest}"


def options(
    checkpoint: Mapping[str, Any], state: Mapping[str, Tensor], architecture: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """See :mod:`fcos_d2.checkpoint.libraries`: the defaults of ``fcos_resnet50_fpn``."""
    keys = {
        # ImageNet's statistics of images in 0..1, here for 0..255.
        "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
        "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
        "INPUT.FORMAT": "RGB",
        "MODEL.RESNETS.STRIDE_IN_1X1": False,
        # Its anchors are around multiples of (padded image size) // (map size).
        "MODEL.FCOS.LOCATION_OFFSET": 0.0,
        "MODEL.FCOS.LOCATION_STEP": "image",
        "MODEL.FCOS.BOX_ACTIVATION": "relu",
        "MODEL.FCOS.QUALITY": "centerness",
        "MODEL.FCOS.CENTERNESS_ON_CLS": False,
        "MODEL.FCOS.SCORE": "sqrt",
        "MODEL.FCOS.SCORE_THRESH_TEST": 0.2,
        "MODEL.FCOS.SCORE_THRESH_ON": "score",
        "MODEL.FCOS.TOPK_CANDIDATES_TEST": 1000,
        "MODEL.FCOS.TOPK_ON": "score",
        "MODEL.FCOS.CLIP_BEFORE_NMS": True,
        "MODEL.FCOS.NMS_THRESH_TEST": 0.6,
        "TEST.DETECTIONS_PER_IMAGE": 100,
    }
    return keys, []


def class_names(checkpoint: Mapping[str, Any], num_outputs: int) -> list[str]:
    """See :mod:`fcos_d2.checkpoint.libraries`: 91 outputs are those of its weights for COCO."""
    coco = FCOS_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    return list(coco) if num_outputs == len(coco) else []


def _count_blocks(blocks: str, state: Mapping[str, Tensor]) -> int:
    numbers = re.findall(rf"^{re.escape(blocks)}\.(\d+)\.", "\n".join(state), re.MULTILINE)
    return 1 + max(map(int, numbers), default=-1)
