"""FCOS of fcos_d2 and of other libraries behind one interface, with the same weights.

One module per library, imported on demand: only torchvision has to be installed.
"""

import importlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fcos_d2.checkpoint.convert import Converted, convert
from fcos_d2.checkpoint.libraries import LIBRARIES

from .base import STRIDES, HeadOutputs, LevelOutputs, Peer
from .ours import Ours

__all__ = [
    "HeadOutputs",
    "LevelOutputs",
    "NAMES",
    "NUM_CLASSES",
    "OURS",
    "Peer",
    "STRIDES",
    "build_pair",
    "build_peers",
    "random_checkpoint",
    "why_missing",
]

NAMES = ("torchvision", "detectron2", "adelaidet")
OURS = Ours.name
NUM_CLASSES = 20  # of build_peers
# The locations of all but torchvision, which has them at multiples of the step.
_CENTERED = {
    "MODEL.FCOS.LOCATION_OFFSET": 0.5,
    "MODEL.FCOS.LOCATION_STEP": "stride",
    "MODEL.FCOS.CLIP_BEFORE_NMS": False,
}
_HOW_TO_GET = {
    "detectron2": "this version of Detectron2 has no FCOS of its own: install its main branch",
    "adelaidet": "AdelaiDet is not installed: install it from its repository, aim-uofa/AdelaiDet",
}


def why_missing(name: str) -> str:
    """Explain why a library can't be run and how to get it; empty if it can."""
    try:
        _adapter(name)
    except ImportError as error:
        return f"{_HOW_TO_GET[name]} ({error})"
    return ""


def build_peers(names: Sequence[str], depth: int, device: str) -> list[Peer]:
    """Build fcos_d2, first, and other libraries' FCOS, all with the same random weights.

    Args:
        names: some of :data:`NAMES`.
        depth: of the ResNet, 18 or 50.
        device: where the models live.

    Raises:
        ImportError: a library is not installed, see :func:`why_missing`.
    """
    weights = random_checkpoint("torchvision", NUM_CLASSES, depth)
    ours, centered = (
        Ours.build(convert(weights, "torchvision", overrides=keys)) for keys in ({}, _CENTERED)
    )
    peers: list[Peer] = [ours]
    for name in names:
        peer = _adapter(name).build(NUM_CLASSES, depth)
        peer.counterpart = ours if name == "torchvision" else centered
        _load_ours(peer.model, name, peer.counterpart.model.state_dict())
        peers.append(peer)
    for peer in [*peers, centered]:
        peer.model.to(device)
    return peers


def build_pair(converted: Converted) -> tuple[Peer, Peer]:
    """Build fcos_d2 and the library that a checkpoint is from, with the weights of the checkpoint.

    Raises:
        ValueError: parity with this library can't be measured.
        ImportError: this version of Detectron2 has no FCOS of its own.
    """
    depth = converted.cfg["MODEL.RESNETS.DEPTH"]
    theirs = _build_original(converted.source, converted.num_outputs, depth)
    theirs.model.load_state_dict(converted.original)
    theirs.class_indices = torch.tensor(converted.class_indices)
    return Ours.build(converted), theirs


def random_checkpoint(
    source: str, num_classes: int, depth: int = 50, seed: int = 1
) -> dict[str, Tensor]:
    """Return random weights of a library's own model, which detect boxes of all levels and scores.

    Batch norms have statistics other than 0 and 1.

    Raises:
        ValueError: parity with this library can't be measured.
        ImportError: this version of Detectron2 has no FCOS of its own.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        state = _build_original(source, num_classes, depth).model.state_dict()
    generator = torch.Generator().manual_seed(seed)

    def uniform(x: Tensor, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(x.shape, generator=generator)

    for name, x in state.items():
        prefix, _, kind = name.rpartition(".")
        if f"{prefix}.running_mean" in state:  # a batch norm
            bounds = {"weight": (0.5, 1.0), "running_var": (0.5, 1.5)}.get(kind, (-0.2, 0.2))
            state[name] = uniform(x, *bounds)
        elif prefix.endswith(("cls_logits", "cls_score")):
            state[name] = 4 * x if kind == "weight" else uniform(x, -4.0, -2.0)
        elif prefix.endswith(("bbox_reg", "bbox_pred")):
            state[name] = 2 * x if kind == "weight" else uniform(x, 0.5, 2.0)
    return state


def _build_original(source: str, num_outputs: int, depth: int) -> Peer:
    if source not in ("torchvision", "detectron2"):
        raise ValueError(
            f"{source} can't be run here: parity is measured against torchvision and detectron2."
        )
    return _adapter(source).build(num_outputs, depth, like_torchvision=False)


def _adapter(name: str) -> type[Peer]:
    return importlib.import_module(f".{name}", __name__).ADAPTER


def _load_ours(model: nn.Module, library: str, ours: Mapping[str, Tensor]) -> None:
    """Load weights of fcos_d2 under the library's names."""
    state = model.state_dict()
    renamed = {LIBRARIES[library].rename(name, state): x for name, x in ours.items()}
    missing = set(state) - set(renamed)
    if any("anchor_generator" not in name for name in missing):
        raise RuntimeError(f"no weights for {sorted(missing)}")
    model.load_state_dict(renamed, strict=False)
