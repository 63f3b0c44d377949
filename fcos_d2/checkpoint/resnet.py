"""Names of a ResNet-FPN's tensors in torchvision and mmdet."""

import logging
import re
from collections.abc import Iterable, Mapping

from torch import Tensor

logger = logging.getLogger(__name__)

# Our names in an FPN: kind, level, norm, tensor.
FPN_NAME = re.compile(r"backbone\.fpn_(lateral|output)(\d)\.(norm\.)?(\w+)")

_STEM = {"stem.conv1": "conv1", "stem.conv1.norm": "bn1"}
_BLOCK = re.compile(r"res([2-5])\.(\d+)\.(.+)")
_BLOCK_PARTS = {
    "conv1.norm": "bn1",
    "conv2.norm": "bn2",
    "conv3.norm": "bn3",
    "shortcut": "downsample.0",
    "shortcut.norm": "downsample.1",
}


def torchvision_resnet_name(name: str) -> str:
    """Return torchvision's name of a tensor of Detectron2's ``ResNet``.

    For example ``stem.conv1.weight`` is ``conv1.weight``, ``res2.0.conv1.norm.bias`` is
    ``layer1.0.bn1.bias``, ``res3.0.shortcut.weight`` is ``layer2.0.downsample.0.weight``. A part
    that torchvision lacks keeps its name.
    """
    module, _, kind = name.rpartition(".")
    block = _BLOCK.fullmatch(module)
    if block:
        stage, index, part = block.groups()
        return f"layer{int(stage) - 1}.{index}.{_BLOCK_PARTS.get(part, part)}.{kind}"
    return f"{_STEM.get(module, module)}.{kind}"


def is_torchvision_resnet(names: Iterable[str]) -> bool:
    """Return whether tensors of these names are of a torchvision ResNet, complete or partial."""
    return {"conv1.weight", "layer1.0.conv1.weight"} <= set(names)


def rename_torchvision_resnet(
    state: Mapping[str, Tensor], model_state: Mapping[str, Tensor], path: str
) -> dict[str, Tensor]:
    """Return the tensors of a torchvision ResNet under the names of the ResNet in a model.

    Args:
        state: of the torchvision ResNet, complete or partial.
        model_state: of the model, whose ResNet may end before layer4.
        path: of the file, for messages.

    Raises:
        ValueError: the model has no ResNet, or one of another shape.
    """
    stems = [name for name in model_state if name.endswith("stem.conv1.weight")]
    if len(stems) != 1:
        raise ValueError(f"{path} is a torchvision ResNet, but the model has none.")
    prefix = stems[0].removesuffix("stem.conv1.weight")
    ours = {
        torchvision_resnet_name(name.removeprefix(prefix)): name
        for name in model_state
        if name.startswith(prefix)
    }
    renamed = {ours[name]: x for name, x in state.items() if name in ours}
    unused = [k for k in state if k not in ours and not k.endswith("num_batches_tracked")]
    stages = {name.partition(".")[0] for name in ours if name.startswith("layer")}
    misfits = [name for name in unused if name.partition(".")[0] in stages]
    misfits += [k for k in ours if k in state and state[k].shape != model_state[ours[k]].shape]
    if misfits:
        raise ValueError(
            f"{path} is a torchvision ResNet of another shape: {len(misfits)} tensors do not fit "
            f"the model ({', '.join(misfits[:3])}, ...). Is MODEL.RESNETS right?"
        )
    missing = [name.removeprefix(prefix) for name in ours.values() if name not in renamed]
    logger.info(
        "Loaded %d tensors of torchvision's ResNet from %s.\n  Not used: %s.\n"
        "  Not in the file, so initialised: %s.",
        len(renamed),
        path,
        ", ".join(unused) or "none",
        ", ".join(missing) or "none",
    )
    return renamed


def count_blocks(prefix: str, names: Iterable[str]) -> int:
    """Return the number of the blocks ``prefix.0``, ``prefix.1``, ... that tensors are in."""
    numbers = re.findall(rf"^{re.escape(prefix)}\.(\d+)\.", "\n".join(names), re.MULTILINE)
    return 1 + max(map(int, numbers), default=-1)
