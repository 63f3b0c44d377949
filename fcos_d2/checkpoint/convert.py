"""Conversion of other libraries' FCOS checkpoints: names of tensors, and keys for equal results."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from tabulate import tabulate
from torch import Tensor

from ..files import atomic_path
from .architecture import build_cfg, expected_state, infer_architecture
from .keys import FACT_KEYS, TEST_KEYS, collect_keys, is_setting
from .libraries import LIBRARIES
from .reader import read_checkpoint, unwrap

_HEAD = "proposal_generator.head"
# Names of class predictor outputs without a class: torchvision's 91 outputs are 80 COCO classes.
_NO_CLASS = ("__background__", "N/A")
# Pixel statistics, anchors and counters are not weights.
_NOT_WEIGHTS = re.compile(
    r"(pixel_mean|pixel_std|(anchor_generator|data_preprocessor)\..*|.*\.num_batches_tracked)"
)
# "filled": with zeros, which change nothing. "left over": in the file, not in our model.
_STATUSES = ("loaded", "filled", "missing", "wrong shape", "left over")


class TensorStatus(NamedTuple):
    """Conversion status of one tensor."""

    group: str  # part of the network
    status: str  # one of _STATUSES
    name: str  # in the library


class Converted(NamedTuple):
    """A converted checkpoint of another library."""

    weights: dict[str, Tensor]  # tensors and settings under our names
    cfg: dict[str, Any]  # values of CARRIED_KEYS with which our model computes the same results
    class_names: list[str]  # of the rows of the class predictor; empty if unknown
    source: str  # name of the library
    tensors: list[TensorStatus]  # of their model and ours
    notes: list[str]  # remarks on settings that the file does not tell
    class_indices: list[int]  # outputs of their class predictor that were kept, in order
    num_outputs: int  # of their class predictor
    original: dict[str, Tensor]  # their state dict


def recognise(names: Iterable[str]) -> list[str]:
    """Return the libraries whose FCOS has tensors of these names, normally one or none."""
    names = list(names)
    return [source for source, library in LIBRARIES.items() if library.recognise(names)]


def convert(
    checkpoint: Mapping[str, Any],
    source: str = "auto",
    class_names: Sequence[str] | None = None,
    partial: bool = False,
    overrides: Mapping[str, Any] | None = None,
) -> Converted:
    """Convert an FCOS checkpoint of torchvision, Detectron2, AdelaiDet or mmdet.

    Args:
        checkpoint: content of the file (:func:`read_checkpoint`), or a state dict.
        source: name of the library; "auto" recognises it by the names of the tensors.
        class_names: of all outputs of the class predictor in order; outputs named
            "__background__" or "N/A" are dropped. The background that torchvision's first output
            stands for may be omitted.
        partial: accept tensors that are missing, left over or of another shape.
        overrides: values of keys, instead of those inferred from the file.

    Raises:
        ValueError: an unknown library; a tensor that does not fit; a wrong number of class names.
    """
    original = unwrap(checkpoint)
    state = dict(original)
    source = _choose_source(source, list(state))
    library = LIBRARIES[source]
    deformable = [name for name in state if "offset" in name]
    if deformable:
        raise ValueError(f"deformable convolutions are not supported: it has {deformable[0]}.")

    def shape_of(name: str) -> tuple[int, ...] | None:
        tensor = state.get(library.rename(name, state))
        return None if tensor is None else tuple(tensor.shape)

    architecture = infer_architecture(shape_of, library.FEWEST_TOP_LEVELS)
    options, notes = library.options(checkpoint, state, architecture)
    defaults = collect_keys(build_cfg({}, 1), (*FACT_KEYS, *TEST_KEYS))
    quality = {"MODEL.FCOS.QUALITY": "centerness"}  # also if its tensors are missing
    cfg = {**defaults, **architecture, **quality, **options, **(overrides or {})}

    shape = shape_of(f"{_HEAD}.cls_score.weight") or shape_of(f"{_HEAD}.cls_score.bias")
    num_outputs = shape[0] if shape else 0
    names = list(class_names or library.class_names(checkpoint, num_outputs))
    names = _name_outputs(names, num_outputs, source)
    kept = [k for k in range(len(names) or num_outputs) if not names or names[k] not in _NO_CLASS]
    for end in ("weight", "bias"):
        predictor = library.rename(f"{_HEAD}.cls_score.{end}", state)
        if predictor in state and state[predictor].shape[:1] == (num_outputs,):
            state[predictor] = state[predictor][kept]

    expected = expected_state(build_cfg(cfg, len(kept) or 1))
    theirs = {name: library.rename(name, state) for name in expected if not is_setting(name)}
    weights, tensors = _match_tensors(expected, theirs, state)
    if not partial:
        _check_tensors(source, tensors)
    return Converted(
        weights={**weights, **{k: x for k, x in expected.items() if is_setting(k)}},
        cfg=cfg,
        class_names=[names[k] for k in kept] if names else [],
        source=source,
        tensors=tensors,
        notes=notes,
        class_indices=kept,
        num_outputs=num_outputs,
        original=original,
    )


def convert_file(
    src: str | os.PathLike[str], dst: str | os.PathLike[str], source: str = "auto", **kwargs: Any
) -> Converted:
    """Convert the file ``src``; write ``model``, ``class_names``, ``cfg``, ``source`` to ``dst``.

    Args:
        src: a checkpoint of another library.
        dst: ``*.pth``, written atomically; folders are created.
        source: name of the library, see :func:`convert`, which takes the other arguments too.

    Raises:
        FileNotFoundError: ``src`` does not exist.
        ValueError: ``src`` can't be read or converted, or ``dst`` is ``src`` or not a ``*.pth``.
    """
    src, dst = os.fspath(src), os.fspath(dst)
    if not os.path.isfile(src):
        raise FileNotFoundError(f"{src}: no such file.")
    if os.path.realpath(src) == os.path.realpath(dst):
        raise ValueError(f"{dst} is the file to convert: name another file to write.")
    if not dst.endswith(".pth"):
        raise ValueError(f"{dst}: the file to write needs the suffix .pth, by which it is read.")
    checkpoint = read_checkpoint(src)
    try:
        converted = convert(checkpoint, source, **kwargs)
    except ValueError as error:
        raise ValueError(f"{src}: {error}") from error
    content = {name: getattr(converted, name) for name in ("class_names", "cfg", "source")}
    with atomic_path(dst) as temporary:
        torch.save({"model": converted.weights, **content}, temporary)
    return converted


def status_table(tensors: Iterable[TensorStatus]) -> str:
    """Return a table of the number of tensors per group and status."""
    groups: dict[str, Counter[str]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.group, Counter())[tensor.status] += 1
    groups["all"] = sum(groups.values(), Counter())
    rows = [[group, *(counts[x] or "" for x in _STATUSES)] for group, counts in groups.items()]
    return tabulate(rows, headers=["tensors", *_STATUSES])


def _choose_source(source: str, names: list[str]) -> str:
    """Return the name of the library that ``source`` names or, if it is "auto", ``names`` show."""
    known = ", ".join(LIBRARIES)
    if source in LIBRARIES:
        return source
    if source != "auto":
        raise ValueError(f"{source} is not one of the supported libraries: {known}, auto.")
    sources = recognise(names)
    if len(sources) == 1:
        return sources[0]
    if any(name.startswith(f"{_HEAD}.") for name in names):
        raise ValueError("it has this package's own names already: there is nothing to convert.")
    problem = f"is not recognised as FCOS of {known}"
    if sources:
        problem = f"looks like FCOS of {' and of '.join(sources)}"
    first = ", ".join(names[:5]) or "nothing"
    raise ValueError(f"it {problem}. It begins with {first}. Name the library: --from.")


def _name_outputs(names: list[str], num_outputs: int, source: str) -> list[str]:
    """Return a name per output of the class predictor, or none; check their number."""
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


def _match_tensors(
    expected: Mapping[str, Tensor], theirs: Mapping[str, str], state: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[TensorStatus]]:
    """Return our weights and the status of each tensor.

    ``theirs`` maps names in our state dict ``expected`` to names in the library's ``state``.
    """
    weights: dict[str, Tensor] = {}
    tensors: list[TensorStatus] = []
    zeros = _zero_tensors(expected, theirs, state)
    for name, source in theirs.items():
        wanted, value, status = expected[name], state.get(source), "loaded"
        if value is None and name in zeros:
            value, status = torch.zeros(wanted.shape, dtype=wanted.dtype), "filled"
        if value is None:
            status = "missing"
        elif value.numel() == wanted.numel() == 1:  # a scale may be a scalar or of length 1
            weights[name] = value.reshape(wanted.shape)
        elif value.shape == wanted.shape:
            weights[name] = value
        else:
            status = "wrong shape"
            source = f"{source} {tuple(value.shape)}, not {tuple(wanted.shape)}"
        tensors.append(TensorStatus(_group(name), status, source))
    used = set(theirs.values())
    for name in state:
        if name not in used and not _NOT_WEIGHTS.fullmatch(name):
            tensors.append(TensorStatus(".".join(name.split(".")[:2]), "left over", name))
    return weights, tensors


def _zero_tensors(
    expected: Mapping[str, Tensor], theirs: Mapping[str, str], state: Mapping[str, Tensor]
) -> set[str]:
    """Return our tensors that are zero where the library has none.

    These are counters and, if no convolution of the towers has a bias, all of these biases: mmdet
    has none before a norm.
    """
    counters = {name for name in expected if name.endswith(".num_batches_tracked")}
    convs = (
        re.fullmatch(rf"({_HEAD}\.\w+_tower\.\d+)\.weight", name)
        for name, x in expected.items()
        if x.dim() == 4 and theirs[name] in state
    )
    biases = {f"{conv[1]}.bias" for conv in convs if conv}
    return counters if any(theirs[name] in state for name in biases) else counters | biases


def _group(name: str) -> str:
    """Return the part of our model that a tensor belongs to: stem, res2, fpn, cls_tower, ..."""
    parts = name.split(".")
    if parts[0] == "backbone":
        return parts[2] if parts[1] == "bottom_up" else re.sub(r"fpn_\w+", "fpn", parts[1])
    return parts[2]


def _check_tensors(source: str, tensors: Iterable[TensorStatus]) -> None:
    """Raise an error that lists all tensors that do not fit."""
    problems: dict[tuple[str, str], list[str]] = {}
    for group, status, name in tensors:
        if status not in ("loaded", "filled"):
            problems.setdefault((status, group), []).append(name)
    if problems:
        lines = [
            f"  {status}, {group} ({len(names)}): {', '.join(names)}\n"
            for (status, group), names in sorted(problems.items())
        ]
        raise ValueError(
            f"{sum(map(len, problems.values()))} tensor(s) do not fit between {source}'s FCOS and "
            f"ours:\n{''.join(lines)}tools/convert_checkpoint.py --partial takes those that fit."
        )
