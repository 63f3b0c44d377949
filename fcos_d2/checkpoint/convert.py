"""Other libraries' FCOS checkpoints to our names, and the keys that make results equal."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from tabulate import tabulate
from torch import Tensor

from ..files import atomic_path
from .architecture import build_cfg, expected_state, infer_architecture
from .libraries import LIBRARIES
from .reader import read_checkpoint, unwrap

_CLS_SCORE = "proposal_generator.head.cls_score"
# Names of outputs that stand for no class (torchvision's COCO has ids of 80 classes in 91 outputs).
_NO_CLASS = ("__background__", "N/A")
# Counters, anchors and statistics of pixels: no weights.
_NO_WEIGHT = re.compile(
    r"(pixel_mean|pixel_std|(anchor_generator|data_preprocessor)\..*|.*\.num_batches_tracked)"
)
_STATUSES = ("loaded", "filled", "missing", "wrong shape", "left over")


class TensorStatus(NamedTuple):
    """Conversion status of one tensor.

    Attributes:
        group: the part of the network that it belongs to.
        status: "loaded"; "filled", with zeros that change nothing; "missing" in the file; of a
            "wrong shape"; "left over", without a place in our model.
        name: the library's name of it.
    """

    group: str
    status: str
    name: str


class Converted(NamedTuple):
    """A checkpoint of another library, converted.

    Attributes:
        weights: the tensors under our names.
        cfg: ``CARRIED_KEYS`` and their values, with which our model computes what theirs does.
        class_names: of the rows of the class predictor; empty where nobody named them.
        source: name of the library.
        tensors: status of each tensor, theirs and ours.
        notes: remarks on what the file does not tell.
        class_indices: the outputs of their class predictor that were kept, in the order of ours.
        num_outputs: how many outputs theirs has.
        original: their state dict.
    """

    weights: dict[str, Tensor]
    cfg: dict[str, Any]
    class_names: list[str]
    source: str
    tensors: list[TensorStatus]
    notes: list[str]
    class_indices: list[int]
    num_outputs: int
    original: dict[str, Tensor]


def recognise(names: Iterable[str]) -> list[str]:
    """Return the libraries whose FCOS has tensors of these names: one, if all is well."""
    names = list(names)
    return [source for source, library in LIBRARIES.items() if library.recognise(names)]


def convert(
    checkpoint: Mapping[str, Any],
    source: str = "auto",
    class_names: Sequence[str] | None = None,
    partial: bool = False,
    overrides: Mapping[str, Any] | None = None,
) -> Converted:
    """Convert a checkpoint of torchvision's, Detectron2's, AdelaiDet's or mmdet's FCOS.

    Args:
        checkpoint: what the file holds (:func:`read_checkpoint`), or a state dict.
        source: name of the library, or "auto" to tell it by the names of the tensors.
        class_names: of all outputs of the class predictor in order; outputs named
            "__background__" or "N/A" are left out. Of torchvision's, whose first output is the
            background, they may be one fewer.
        partial: take what fits where tensors are missing, left over or of another shape.
        overrides: keys that are known better than they can be told from the file.

    Raises:
        ValueError: the library is not recognised or can't be read; not all tensors have a place
            and fit; there are not as many class names as outputs.
    """
    original = unwrap(checkpoint)
    state = dict(original)
    source = _choose(source, state)
    library = LIBRARIES[source]
    _refuse_deformable(state)

    def shape_of(name: str) -> tuple[int, ...] | None:
        tensor = state.get(library.rename(name, state))
        return None if tensor is None else tuple(tensor.shape)

    cfg = infer_architecture(shape_of, library.FEWEST_TOP_LEVELS)
    options, notes = library.options(checkpoint, state, cfg)
    cfg = {**cfg, **options, **(overrides or {})}
    num_outputs = (shape_of(f"{_CLS_SCORE}.weight") or shape_of(f"{_CLS_SCORE}.bias") or (0,))[0]
    names = list(class_names or library.class_names(checkpoint, num_outputs))
    names = _slot_names(names, num_outputs, source)
    class_indices = [
        k for k in range(len(names) or num_outputs) if not names or names[k] not in _NO_CLASS
    ]

    expected = expected_state(build_cfg(cfg, len(class_indices) or 1))
    for end in ("weight", "bias"):
        _keep_rows(state, library.rename(f"{_CLS_SCORE}.{end}", state), class_indices, num_outputs)
    weights, tensors = _take(expected, state, library)
    if not partial:
        _refuse_misfits(source, tensors)
    return Converted(
        weights=weights,
        cfg=cfg,
        class_names=[names[k] for k in class_indices] if names else [],
        source=source,
        tensors=tensors,
        notes=notes,
        class_indices=class_indices,
        num_outputs=num_outputs,
        original=original,
    )


def convert_file(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    source: str = "auto",
    class_names: Sequence[str] | None = None,
    partial: bool = False,
    overrides: Mapping[str, Any] | None = None,
) -> Converted:
    """Convert the file ``src`` to ``dst``, which is there whole or not at all.

    ``dst`` holds ``model``, ``class_names``, ``cfg`` and ``source``.

    Args:
        src: a checkpoint of another library.
        dst: file to write, ``*.pth``; folders are made as needed.
        source: see :func:`convert`, as are the others.

    Raises:
        FileNotFoundError: there is no ``src``.
        ValueError: ``src`` can't be read or converted, or ``dst`` can't be the name of the result.
    """
    src, dst = os.fspath(src), os.fspath(dst)
    if not os.path.isfile(src):
        raise FileNotFoundError(f"{src}: no such file.")
    if os.path.realpath(src) == os.path.realpath(dst):
        raise ValueError(f"{dst} is the file to convert: name another one to write.")
    if not dst.endswith(".pth"):
        raise ValueError(f"{dst}: the file to write needs the ending .pth, by which it is read.")
    checkpoint = read_checkpoint(src)
    try:
        converted = convert(checkpoint, source, class_names, partial, overrides)
    except ValueError as error:
        raise ValueError(f"{src}: {error}") from error
    content = {
        "model": converted.weights,
        "class_names": converted.class_names,
        "cfg": converted.cfg,
        "source": converted.source,
    }
    with atomic_path(dst) as temporary:
        torch.save(content, temporary)
    return converted


def status_table(tensors: Iterable[TensorStatus]) -> str:
    """Lay out how many tensors of each group have each status, and their sum."""
    groups: dict[str, Counter] = {}
    for tensor in tensors:
        groups.setdefault(tensor.group, Counter())[tensor.status] += 1
    groups["all"] = sum(groups.values(), Counter())
    rows = [
        [group, *(counts[what] or "" for what in _STATUSES)] for group, counts in groups.items()
    ]
    return tabulate(rows, headers=["tensors", *_STATUSES])


def _choose(source: str, names: Iterable[str]) -> str:
    """Return the name of the library; "auto" finds it by the names of the tensors."""
    names = list(names)
    known = ", ".join(LIBRARIES)
    if source in LIBRARIES:
        return source
    if source != "auto":
        raise ValueError(f"{source} is not one of the libraries that can be read: {known}, auto.")
    sources = recognise(names)
    if len(sources) == 1:
        return sources[0]
    if any(name.startswith("proposal_generator.head.") for name in names):
        raise ValueError("it has this package's own names already: nothing is to be converted.")
    seen = f"It begins with {', '.join(names[:5]) or 'nothing'}."
    if sources:
        raise ValueError(
            f"it looks like FCOS of {' and of '.join(sources)}. {seen} Say which one it is: --from."
        )
    raise ValueError(
        f"it is not recognised as FCOS of one of {known}. {seen} If it is, say of which: --from."
    )


def _refuse_deformable(names: Iterable[str]) -> None:
    found = [name for name in names if "offset" in name]
    if found:
        raise ValueError(f"deformable convolutions can't be read, and it has some: {found[0]}.")


def _slot_names(names: list[str], num_outputs: int, source: str) -> list[str]:
    """Return one name for each output of the class predictor, or none at all.

    Raises:
        ValueError: another number of names.
    """
    has_background = source == "torchvision"
    if has_background and len(names) == num_outputs - 1:
        return [_NO_CLASS[0], *names]
    if names and num_outputs and len(names) != num_outputs:
        one_fewer = f", or {num_outputs - 1} without the background" if has_background else ""
        raise ValueError(
            f"its class predictor has {num_outputs} outputs, but there are {len(names)} class "
            f"names: name {num_outputs}{one_fewer} (--classes)."
        )
    return names


def _keep_rows(
    state: dict[str, Tensor], name: str, class_indices: list[int], num_outputs: int
) -> None:
    """Leave out, in place, the rows of the class predictor that stand for no class."""
    if name in state and state[name].shape[:1] == (num_outputs,):
        state[name] = state[name][class_indices]


def _take(
    expected: Mapping[str, Tensor], state: Mapping[str, Tensor], library: ModuleType
) -> tuple[dict[str, Tensor], list[TensorStatus]]:
    """Return the tensors of our model that ``state`` has, and what became of each."""
    weights: dict[str, Tensor] = {}
    tensors: list[TensorStatus] = []
    used = set()
    fillable = _fillable(expected, state, library)
    for name, wanted in expected.items():
        theirs, group = library.rename(name, state), _group(name)
        used.add(theirs)
        value = state.get(theirs)
        if value is not None and value.numel() == wanted.numel() == 1:
            value = value.reshape(wanted.shape)  # a scale is a number, or a list of one
        if value is None and name in fillable:
            weights[name] = torch.zeros(wanted.shape, dtype=wanted.dtype)
            tensors.append(TensorStatus(group, "filled", theirs))
        elif value is None:
            tensors.append(TensorStatus(group, "missing", theirs))
        elif value.shape != wanted.shape:
            shapes = f"{theirs} {tuple(value.shape)}, not {tuple(wanted.shape)}"
            tensors.append(TensorStatus(group, "wrong shape", shapes))
        else:
            weights[name] = value
            tensors.append(TensorStatus(group, "loaded", theirs))
    for name in state:
        if name not in used and not _NO_WEIGHT.fullmatch(name):
            tensors.append(TensorStatus(".".join(name.split(".")[:2]), "left over", name))
    return weights, tensors


def _fillable(
    expected: Mapping[str, Tensor], state: Mapping[str, Tensor], library: ModuleType
) -> set[str]:
    """Names of our tensors that are zero where the library has none.

    These are counters, and the biases of the towers' convolutions in a model that has none of
    them: before a norm mmdet leaves them out.
    """
    counters = {name for name in expected if name.endswith(".num_batches_tracked")}
    biases = {
        name
        for name in expected
        if re.fullmatch(r"proposal_generator\.head\.\w+_tower\.\d+\.bias", name)
        and expected[name.replace(".bias", ".weight")].dim() == 4
        and library.rename(name.replace(".bias", ".weight"), state) in state
    }
    if any(library.rename(name, state) in state for name in biases):
        biases = set()
    return counters | biases


def _group(name: str) -> str:
    """The part of our model that a tensor belongs to: stem, res2, fpn, top_block, cls_tower."""
    parts = name.split(".")
    if parts[0] == "backbone":
        return parts[2] if parts[1] == "bottom_up" else re.sub(r"fpn_\w+", "fpn", parts[1])
    return parts[2]


def _refuse_misfits(source: str, tensors: Iterable[TensorStatus]) -> None:
    """Raise an error that lists all tensors without a place or of a wrong shape, if there are."""
    problems: dict[tuple[str, str], list[str]] = {}
    for group, what, name in tensors:
        if what not in ("loaded", "filled"):
            problems.setdefault((what, group), []).append(name)
    if not problems:
        return
    lines = [
        f"  {what}, {group} ({len(names)}): {', '.join(names)}"
        for (what, group), names in sorted(problems.items())
    ]
    count = sum(map(len, problems.values()))
    raise ValueError(
        f"{count} tensor(s) do not fit between {source}'s FCOS and ours:\n"
        + "\n".join(lines)
        + "\ntools/convert_checkpoint.py --partial takes those that fit."
    )
