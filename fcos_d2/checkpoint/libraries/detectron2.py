"""``detectron2.modeling.meta_arch.fcos`` of Detectron2 since v0.6."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

FEWEST_TOP_LEVELS = 2

_HEAD = {
    "cls_tower": "cls_subnet",
    "box_tower": "bbox_subnet",
    "box_pred": "bbox_pred",
    "centerness": "ctrness",
}
# Its batch norms of several levels have one weight and bias together.
_LEVELS_NORM = re.compile(r"(head\.\w+\.\d+)\.\d+\.(weight|bias)")

INPUT_NOTE = (
    "The file does not tell which ImageNet weights its training started from. The normalisation of "
    "pixels and STRIDE_IN_1X1 are those of Detectron2's own; for others name MODEL.PIXEL_MEAN, "
    "MODEL.PIXEL_STD, INPUT.FORMAT and MODEL.RESNETS.STRIDE_IN_1X1."
)


def recognise(names: Iterable[str]) -> bool:
    """See :mod:`fcos_d2.checkpoint.libraries`."""
    return any(name.startswith("head.ctrness.") for name in names)


def rename(name: str, state: Mapping[str, Tensor]) -> str:
    """See :mod:`fcos_d2.checkpoint.libraries`: the names of the backbone are Detectron2's."""
    if not name.startswith("proposal_generator.head."):
        return name
    part, _, rest = name.removeprefix("proposal_generator.head.").partition(".")
    return _LEVELS_NORM.sub(r"\1.\2", f"head.{_HEAD.get(part, part)}.{rest}")


def options(
    checkpoint: Mapping[str, Any], state: Mapping[str, Tensor], architecture: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """See :mod:`fcos_d2.checkpoint.libraries`: those of ``configs/common/models/fcos.py``."""
    keys = {
        **input_options(state, architecture),
        "MODEL.FCOS.LOCATION_OFFSET": 0.5,
        "MODEL.FCOS.LOCATION_STEP": "stride",
        "MODEL.FCOS.BOX_ACTIVATION": "relu",
        "MODEL.FCOS.QUALITY": "centerness",
        "MODEL.FCOS.CENTERNESS_ON_CLS": False,
        "MODEL.FCOS.SCORE": "sqrt",
        "MODEL.FCOS.SCORE_THRESH_TEST": 0.2,
        "MODEL.FCOS.SCORE_THRESH_ON": "score",
        "MODEL.FCOS.TOPK_CANDIDATES_TEST": 1000,
        "MODEL.FCOS.TOPK_ON": "score",
        "MODEL.FCOS.CLIP_BEFORE_NMS": False,
        "MODEL.FCOS.NMS_THRESH_TEST": 0.6,
        "TEST.DETECTIONS_PER_IMAGE": 100,
    }
    return keys, [INPUT_NOTE]


def class_names(checkpoint: Mapping[str, Any], num_outputs: int) -> list[str]:
    """See :mod:`fcos_d2.checkpoint.libraries`: its checkpoints hold none."""
    return []


def input_options(state: Mapping[str, Tensor], architecture: Mapping[str, Any]) -> dict[str, Any]:
    """What goes in, for the ImageNet weights of Detectron2's zoo that training starts from.

    Its ResNets are MSRA's, its ResNeXts FAIR's. Models of older versions hold the statistics of
    the pixels themselves.
    """
    groups = architecture["MODEL.RESNETS.NUM_GROUPS"]
    std = [57.375, 57.12, 58.395] if groups == 32 else [1.0, 1.0, 1.0]
    return {
        "MODEL.PIXEL_MEAN": _statistics(state, "pixel_mean", [103.53, 116.28, 123.675]),
        "MODEL.PIXEL_STD": _statistics(state, "pixel_std", std),
        "INPUT.FORMAT": "BGR",
        "MODEL.RESNETS.STRIDE_IN_1X1": groups == 1,
    }


def _statistics(state: Mapping[str, Tensor], name: str, default: list[float]) -> list[float]:
    if name not in state:
        return default
    # float32 holds seven digits.
    return [float(f"{x:.7g}") for x in state[name].flatten().tolist()]
