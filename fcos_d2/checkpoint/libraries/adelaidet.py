"""AdelaiDet's proposal generator ``FCOS``, in ``OneStageDetector``."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from .detectron2 import INPUT_NOTE, input_options

FEWEST_TOP_LEVELS = 1

_HEAD = {
    "box_tower": "bbox_tower",
    "cls_score": "cls_logits",
    "box_pred": "bbox_pred",
    "centerness": "ctrness",
}

_SETTINGS_NOTE = (
    "Nor does it tell settings: if the model was used with THRESH_WITH_CTR, name "
    "MODEL.FCOS.SCORE_THRESH_ON score and MODEL.FCOS.SCORE_THRESH_TEST 0.2236 (the root of 0.05). "
    "To go on training as AdelaiDet does, name MODEL.FCOS.BOX_LOSS_WEIGHT centerness, or "
    "MODEL.FCOS.QUALITY iou if BOX_QUALITY was iou."
)


def recognise(names: Iterable[str]) -> bool:
    """See :mod:`fcos_d2.checkpoint.libraries`."""
    return any(name.startswith("proposal_generator.fcos_head.") for name in names)


def rename(name: str, state: Mapping[str, Tensor]) -> str:
    """See :mod:`fcos_d2.checkpoint.libraries`: the names of the backbone are Detectron2's."""
    if not name.startswith("proposal_generator.head."):
        return name
    part, _, rest = name.removeprefix("proposal_generator.head.").partition(".")
    return f"proposal_generator.fcos_head.{_HEAD.get(part, part)}.{rest}"


def options(
    checkpoint: Mapping[str, Any], state: Mapping[str, Tensor], architecture: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """See :mod:`fcos_d2.checkpoint.libraries`: those of ``configs/FCOS-Detection/Base-FCOS.yaml``.

    Models trained with BOX_QUALITY "iou" are used in the same way, only the training differs.
    """
    keys = {
        **input_options(state, architecture),
        "MODEL.FCOS.LOCATION_OFFSET": 0.5,
        "MODEL.FCOS.LOCATION_STEP": "stride",
        "MODEL.FCOS.BOX_ACTIVATION": "relu",
        "MODEL.FCOS.QUALITY": "centerness",
        "MODEL.FCOS.CENTERNESS_ON_CLS": False,
        "MODEL.FCOS.SCORE": "sqrt",
        "MODEL.FCOS.SCORE_THRESH_TEST": 0.05,
        "MODEL.FCOS.SCORE_THRESH_ON": "cls",
        "MODEL.FCOS.TOPK_CANDIDATES_TEST": 1000,
        "MODEL.FCOS.TOPK_ON": "score",
        "MODEL.FCOS.CLIP_BEFORE_NMS": False,
        "MODEL.FCOS.NMS_THRESH_TEST": 0.6,
        "TEST.DETECTIONS_PER_IMAGE": 100,
    }
    return keys, [INPUT_NOTE, _SETTINGS_NOTE]


def class_names(checkpoint: Mapping[str, Any], num_outputs: int) -> list[str]:
    """See :mod:`fcos_d2.checkpoint.libraries`: its checkpoints hold none."""
    return []
