"""Class names and keys of a checkpoint, and configs that follow them."""

import logging
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from detectron2.config import CfgNode

from .convert import convert, recognise
from .keys import ARCHITECTURE_KEYS, CARRIED_KEYS, FACT_KEYS, collect_keys, set_keys, state_facts
from .reader import find_weights, read_checkpoint, unwrap

logger = logging.getLogger(__name__)


class CheckpointInfo(NamedTuple):
    """Content of a checkpoint beside the weights."""

    class_names: list[str]  # empty if unknown
    num_classes: int  # rows of the class predictor; 0 without one
    cfg: dict[str, Any]  # values of the keys that the weights were made for; empty if unknown


def read_info(path: str) -> CheckpointInfo:
    """Read class names and keys of MODEL.WEIGHTS ``path``, which may be another library's FCOS.

    Raises:
        FileNotFoundError: the file does not exist, or its URL can't be reached.
        ValueError: it is not a checkpoint, or can't be converted.
    """
    checkpoint = read_checkpoint(find_weights(path), lazy=True)
    try:
        weights = unwrap(checkpoint)
        if recognise(weights):
            converted = convert(checkpoint)
            num_classes = len(converted.class_indices)
            return CheckpointInfo(converted.class_names, num_classes, converted.cfg)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    predictor = weights.get("proposal_generator.head.cls_score.weight")
    saved = checkpoint.get("cfg")  # a string in Caffe2's files
    return CheckpointInfo(
        class_names=[str(name) for name in checkpoint.get("class_names") or ()],
        num_classes=0 if predictor is None else len(predictor),
        cfg={**state_facts(weights), **(saved if isinstance(saved, Mapping) else {})},
    )


def keys_to_save(cfg: CfgNode) -> dict[str, Any]:
    """Return the keys that are needed to build and use a trained model.

    For other meta architectures than FCOS only the facts: their other parts have keys of their own.
    """
    is_fcos = cfg.MODEL.META_ARCHITECTURE == "FCOS"
    return collect_keys(cfg, FACT_KEYS + (ARCHITECTURE_KEYS if is_fcos else ()))


def apply_checkpoint_keys(
    cfg: CfgNode, path: str, *, training: bool, keep: Collection[str] = ()
) -> None:
    """Set the keys of ``cfg`` that the weights of ``path`` were made for, and log the changes.

    Args:
        cfg: not frozen; changed in place.
        path: MODEL.WEIGHTS, or a checkpoint to resume from. An empty path and a file without keys
            change nothing.
        training: whether training starts from the weights, in a network that may be another: only
            ``FACT_KEYS`` are set. Otherwise (inference, resuming) all keys of the file are set.
        keep: keys that were set by hand and stay.

    Raises:
        FileNotFoundError: the file does not exist, or its URL can't be reached.
        ValueError: it is not a checkpoint, or a value is not of its key's type.
    """
    carried = read_info(path).cfg if path else {}
    wanted = [key for key in (FACT_KEYS if training else CARRIED_KEYS) if key in carried]
    recipe, made_for = collect_keys(cfg, wanted), cfg.clone()
    try:
        set_keys(made_for, {key: carried[key] for key in wanted})
    except ValueError as error:
        raise ValueError(f"{path} has a key that can't be used: {error}") from error
    changed = {k: v for k, v in collect_keys(made_for, wanted).items() if v != recipe[k]}
    set_keys(cfg, {key: value for key, value in changed.items() if key not in keep})
    if changed:
        lines = [
            f"  {key} {value} ({'kept, as set by hand' if key in keep else 'recipe'}: "
            f"{recipe[key]})"
            for key, value in changed.items()
        ]
        logger.info("MODEL.WEIGHTS %s was made for:\n%s", path, "\n".join(lines))
