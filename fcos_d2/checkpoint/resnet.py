"""torchvision's names of a ResNet's tensors."""

import re
from collections.abc import Iterable

_STEM = {"stem.conv1": "conv1", "stem.conv1.norm": "bn1"}
_BLOCK_PARTS = {
    "conv1": "conv1",
    "conv1.norm": "bn1",
    "conv2": "conv2",
    "conv2.norm": "bn2",
    "conv3": "conv3",
    "conv3.norm": "bn3",
    "shortcut": "downsample.0",
    "shortcut.norm": "downsample.1",
}
_BLOCK = re.compile(r"res([2-5])\.(\d+)\.(.+)")


def torchvision_resnet_name(name: str) -> str:
    """Return torchvision's name of a tensor of Detectron2's ``ResNet``.

    ``stem.conv1.weight`` is ``conv1.weight`` there, ``res2.0.conv1.norm.bias`` is
    ``layer1.0.bn1.bias``, ``res3.0.shortcut.weight`` is ``layer2.0.downsample.0.weight``. A part
    that torchvision's has not keeps its name.
    """
    module, _, kind = name.rpartition(".")
    block = _BLOCK.fullmatch(module)
    if block:
        stage, index, part = block.groups()
        return f"layer{int(stage) - 1}.{index}.{_BLOCK_PARTS.get(part, part)}.{kind}"
    return f"{_STEM.get(module, module)}.{kind}"


def is_torchvision_resnet(names: Iterable[str]) -> bool:
    """Tell a torchvision ResNet, complete or partial, by the names of its tensors."""
    names = set(names)
    return "conv1.weight" in names and "layer1.0.conv1.weight" in names
