"""What a checkpoint says about itself, and a config that follows it."""

import logging
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from detectron2.config import CfgNode

from .convert import convert, recognise
from .keys import ARCHITECTURE_KEYS, CARRIED_KEYS, FACT_KEYS, collect_keys, set_keys
from .reader import find_weights, read_checkpoint, unwrap

logger = logging.getLogger(__name__)


class CheckpointInfo(NamedTuple):
    """What is known beside the weights.

    Attributes:
        class_names: empty where the file holds none.
        num_classes: rows of the class predictor; 0 without one.
        cfg: keys that the weights were made for, and their values; empty where it holds none.
    """

    class_names: list[str]
    num_classes: int
    cfg: dict[str, Any]


def read_info(path: str) -> CheckpointInfo:
    """Read what MODEL.WEIGHTS ``path`` says about itself, of another library's FCOS too.

    Raises:
        FileNotFoundError: the file is not there, or its URL can't be reached.
        ValueError: it is no checkpoint, or can't be converted.
    """
    local = find_weights(path)
    checkpoint = read_checkpoint(local, lazy=True)
    try:
        weights = unwrap(checkpoint)
        if recognise(weights):
            converted = convert(checkpoint)
            return CheckpointInfo(
                converted.class_names, len(converted.class_indices), converted.cfg
            )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    head = weights.get("proposal_generator.head.cls_score.weight")
    cfg = checkpoint.get("cfg")
    return CheckpointInfo(
        class_names=[str(name) for name in checkpoint.get("class_names") or ()],
        num_classes=0 if head is None else len(head),
        cfg=dict(cfg) if isinstance(cfg, Mapping) else {},  # Caffe2's files have a text there
    )


def keys_to_save(cfg: CfgNode) -> dict[str, Any]:
    """Return the keys that a trained model needs to be built and used as it was trained.

    Of a model with more in it than FCOS they tell the facts alone: its other parts have keys of
    their own.
    """
    is_fcos = cfg.MODEL.META_ARCHITECTURE == "FCOS"
    return collect_keys(cfg, FACT_KEYS + (ARCHITECTURE_KEYS if is_fcos else ()))


def apply_checkpoint_keys(
    cfg: CfgNode, path: str, *, training: bool, keep: Collection[str] = ()
) -> None:
    """Set the keys of ``cfg`` that the weights of ``path`` were made for, and log what changed.

    Args:
        cfg: not frozen; changed in place.
        path: MODEL.WEIGHTS, or a checkpoint to go on with; empty changes nothing, as does a file
            that holds no keys.
        training: training starts from the weights, in a network that may be another: only
            ``FACT_KEYS`` are set. Otherwise (inference, or to go on) all that the file holds.
        keep: keys that stay as they are, set by hand.

    Raises:
        FileNotFoundError: the file is not there, or its URL can't be reached.
        ValueError: it is no checkpoint, or a value in it is not of its key's type.
    """
    carried = read_info(path).cfg if path else {}
    wanted = [key for key in (FACT_KEYS if training else CARRIED_KEYS) if key in carried]
    recipe, made_for = collect_keys(cfg, wanted), cfg.clone()
    try:
        set_keys(made_for, {key: carried[key] for key in wanted})
    except ValueError as error:
        raise ValueError(f"{path} holds a key that can't be used: {error}") from error
    other = {k: v for k, v in collect_keys(made_for, wanted).items() if v != recipe[k]}
    set_keys(cfg, {key: value for key, value in other.items() if key not in keep})
    if other:
        lines = [
            f"  {key} {value} (kept, as set by hand: {recipe[key]})"
            if key in keep
            else f"  {key} {value} (recipe: {recipe[key]})"
            for key, value in other.items()
        ]
        logger.info("MODEL.WEIGHTS %s was made for:\n%s", path, "\n".join(lines))
