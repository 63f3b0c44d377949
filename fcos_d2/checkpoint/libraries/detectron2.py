"""``detectron2.modeling.meta_arch.fcos`` (Detectron2 v0.6); see the package's docstring."""

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
# The batch norms of the levels share one weight and bias.
_LEVEL_NORM = re.compile(r"(head\.\w+\.\d+)\.\d+\.(weight|bias)")

INPUT_NOTE = (
    "The file does not tell which ImageNet weights its training started from. The pixel statistics "
    "and STRIDE_IN_1X1 are those of Detectron2's own; for others set MODEL.PIXEL_MEAN, "
    "MODEL.PIXEL_STD, INPUT.FORMAT and MODEL.RESNETS.STRIDE_IN_1X1."
)


def recognise(names: Iterable[str]) -> bool:
    return any(name.startswith("head.ctrness.") for name in names)


def rename(name: str, state: Mapping[str, Tensor]) -> str:
    if not name.startswith("proposal_generator.head."):
        return name  # the backbone's names are Detectron2's
    part, _, rest = name.removeprefix("proposal_generator.head.").partition(".")
    return _LEVEL_NORM.sub(r"\1.\2", f"head.{_HEAD.get(part, part)}.{rest}")


def options(
    checkpoint: Mapping[str, Any], state: Mapping[str, Tensor], architecture: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    # From configs/common/models/fcos.py.
    keys = {
        **input_options(state, architecture),
        "MODEL.FCOS.SCORE_THRESH_TEST": 0.2,
        "MODEL.FCOS.CLIP_BEFORE_NMS": False,
    }
    return keys, [INPUT_NOTE]


def class_names(checkpoint: Mapping[str, Any], num_outputs: int) -> list[str]:
    return []  # its checkpoints have none


def input_options(state: Mapping[str, Tensor], architecture: Mapping[str, Any]) -> dict[str, Any]:
    """Return the input options of the ImageNet weights in Detectron2's model zoo.

    Its ResNets are MSRA's, its ResNeXts FAIR's. Older models hold the pixel statistics themselves.
    """
    groups = architecture["MODEL.RESNETS.NUM_GROUPS"]
    statistics = {
        "pixel_mean": [103.53, 116.28, 123.675],
        "pixel_std": [57.375, 57.12, 58.395] if groups == 32 else [1.0, 1.0, 1.0],
    }
    for name in statistics.keys() & state.keys():  # float32 has seven digits
        statistics[name] = [float(f"{x:.7g}") for x in state[name].flatten().tolist()]
    return {
        "MODEL.PIXEL_MEAN": statistics["pixel_mean"],
        "MODEL.PIXEL_STD": statistics["pixel_std"],
        "INPUT.FORMAT": "BGR",
        "MODEL.RESNETS.STRIDE_IN_1X1": groups == 1,
    }
