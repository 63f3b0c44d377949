"""AdelaiDet's proposal generator ``FCOS`` in ``OneStageDetector``; see the package's docstring."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from .detectron2 import INPUT_NOTE, class_names, input_options

__all__ = ["FEWEST_TOP_LEVELS", "class_names", "options", "recognise", "rename"]

FEWEST_TOP_LEVELS = 1

_HEAD = {
    "box_tower": "bbox_tower",
    "cls_score": "cls_logits",
    "box_pred": "bbox_pred",
    "centerness": "ctrness",
}
_SETTINGS_NOTE = (
    "Nor does it tell settings: if the model was used with THRESH_WITH_CTR, set "
    "MODEL.FCOS.SCORE_THRESH_ON score and MODEL.FCOS.SCORE_THRESH_TEST 0.2236 (the root of 0.05). "
    "To continue training as AdelaiDet does, set MODEL.FCOS.BOX_LOSS_WEIGHT centerness, or "
    "MODEL.FCOS.QUALITY iou if BOX_QUALITY was iou."
)


def recognise(names: Iterable[str]) -> bool:
    return any(name.startswith("proposal_generator.fcos_head.") for name in names)


def rename(name: str, state: Mapping[str, Tensor]) -> str:
    if not name.startswith("proposal_generator.head."):
        return name  # the backbone's names are Detectron2's
    part, _, rest = name.removeprefix("proposal_generator.head.").partition(".")
    return f"proposal_generator.fcos_head.{_HEAD.get(part, part)}.{rest}"


def options(
    checkpoint: Mapping[str, Any], state: Mapping[str, Tensor], architecture: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    # From configs/FCOS-Detection/Base-FCOS.yaml. BOX_QUALITY "iou" changes the training only.
    keys = {
        **input_options(state, architecture),
        "MODEL.FCOS.SCORE_THRESH_ON": "cls",
        "MODEL.FCOS.CLIP_BEFORE_NMS": False,
    }
    return keys, [INPUT_NOTE, _SETTINGS_NOTE]
