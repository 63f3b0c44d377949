"""torchvision's ResNet key names to Detectron2's."""

import re
from collections.abc import Mapping

from torch import Tensor

_STEM = {"conv1": "stem.conv1", "bn1": "stem.conv1.norm"}
_BLOCK_PARTS = {
    "conv1": "conv1",
    "bn1": "conv1.norm",
    "conv2": "conv2",
    "bn2": "conv2.norm",
    "conv3": "conv3",
    "bn3": "conv3.norm",
    "downsample.0": "shortcut",
    "downsample.1": "shortcut.norm",
}
_BLOCK = re.compile(r"layer([1-4])\.(\d+)\.(" + "|".join(map(re.escape, _BLOCK_PARTS)) + r")\.(.+)")


def is_torchvision_resnet(state_dict: Mapping[str, Tensor]) -> bool:
    """Tell a torchvision ResNet, complete or partial, by its names."""
    return "conv1.weight" in state_dict and "layer1.0.conv1.weight" in state_dict


def convert_torchvision_resnet(
    state_dict: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], list[str]]:
    """Rename a torchvision ResNet, or the part of one that is there.

    Returns:
        The tensors under the names of Detectron2's ``ResNet`` (``stem.conv1.weight``,
        ``res2.0.conv1.norm.bias``, ...), and the names that have no place there (``fc.weight``).
        ``num_batches_tracked`` is neither: it counts and holds no weight.
    """
    renamed, unused = {}, []
    for name, tensor in state_dict.items():
        if name.endswith("num_batches_tracked"):
            continue
        module, _, kind = name.rpartition(".")
        block = _BLOCK.fullmatch(name)
        if module in _STEM:
            renamed[f"{_STEM[module]}.{kind}"] = tensor
        elif block:
            stage, index, part, kind = block.groups()
            renamed[f"res{int(stage) + 1}.{index}.{_BLOCK_PARTS[part]}.{kind}"] = tensor
        else:
            unused.append(name)
    return renamed, unused
