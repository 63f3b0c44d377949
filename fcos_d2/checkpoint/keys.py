"""Config keys that are stored with weights."""

from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from typing import Any

from detectron2.config import CfgNode, get_cfg
from torch import Tensor

from ..config import add_fcos_config, update_names
from ..modeling.saved_settings import decode_settings

# Settings that weights depend on and tensor shapes do not show, by their names in a state dict
# (modeling/saved_settings.py).
_STATE_KEYS = {
    "pixel_mean": "MODEL.PIXEL_MEAN",
    "pixel_std": "MODEL.PIXEL_STD",
    "trained_format": "INPUT.FORMAT",
    "stride_in_1x1": "MODEL.RESNETS.STRIDE_IN_1X1",
    "location_offset": "MODEL.FCOS.LOCATION_OFFSET",
    "location_step": "MODEL.FCOS.LOCATION_STEP",
    "box_activation": "MODEL.FCOS.BOX_ACTIVATION",
    "centerness_on_cls": "MODEL.FCOS.CENTERNESS_ON_CLS",
}
# A state dict does not hold TOP_BLOCK_IN_FEATURE: the shape of P6 shows it.
FACT_KEYS = (*_STATE_KEYS.values(), "MODEL.FCOS.TOP_BLOCK_IN_FEATURE")

# The network. Without the number of classes, which the class names and the class predictor have.
ARCHITECTURE_KEYS = (
    "MODEL.META_ARCHITECTURE",
    "MODEL.BACKBONE.NAME",
    "MODEL.PROPOSAL_GENERATOR.NAME",
    "MODEL.RESNETS.DEPTH",
    "MODEL.RESNETS.STEM_OUT_CHANNELS",
    "MODEL.RESNETS.RES2_OUT_CHANNELS",
    "MODEL.RESNETS.NUM_GROUPS",
    "MODEL.RESNETS.WIDTH_PER_GROUP",
    "MODEL.RESNETS.NORM",
    "MODEL.RESNETS.OUT_FEATURES",
    "MODEL.FPN.IN_FEATURES",
    "MODEL.FPN.OUT_CHANNELS",
    "MODEL.FPN.NORM",
    "MODEL.FPN.FUSE_TYPE",
    "MODEL.FCOS.IN_FEATURES",
    "MODEL.FCOS.SIZES_OF_INTEREST",
    "MODEL.FCOS.NUM_SHARED_CONVS",
    "MODEL.FCOS.NUM_CLS_CONVS",
    "MODEL.FCOS.NUM_BOX_CONVS",
    "MODEL.FCOS.NORM",
    "MODEL.FCOS.USE_SCALE",
    # Training may choose another: "centerness" and "iou" use the same branch.
    "MODEL.FCOS.QUALITY",
    "MODEL.FCOS.CLASS_AGNOSTIC",
)

# Decoding of detections.
TEST_KEYS = (
    "MODEL.FCOS.SCORE",
    "MODEL.FCOS.SCORE_THRESH_TEST",
    "MODEL.FCOS.SCORE_THRESH_ON",
    "MODEL.FCOS.TOPK_CANDIDATES_TEST",
    "MODEL.FCOS.TOPK_ON",
    "MODEL.FCOS.CLIP_BEFORE_NMS",
    "MODEL.FCOS.NMS_THRESH_TEST",
    "TEST.DETECTIONS_PER_IMAGE",
)

CARRIED_KEYS = FACT_KEYS + ARCHITECTURE_KEYS + TEST_KEYS


def collect_keys(cfg: CfgNode, keys: Iterable[str]) -> dict[str, Any]:
    """Return the values of dotted keys in ``cfg``."""
    return {key: reduce(getattr, key.split("."), cfg) for key in keys}


def set_keys(cfg: CfgNode, keys: Mapping[str, Any]) -> None:
    """Set dotted keys of ``cfg``, which is not frozen; ValueError for a value of a wrong type."""
    cfg.merge_from_list([x for pair in keys.items() for x in pair])
    update_names(cfg)


def is_setting(name: str) -> bool:
    """Return whether an entry of a state dict holds ``FACT_KEYS`` instead of weights."""
    return name.rpartition(".")[2] in ("_extra_state", "pixel_mean", "pixel_std")


def state_facts(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the ``FACT_KEYS`` that the state dict of a model of this package holds."""
    facts: dict[str, Any] = {}
    for name in state:
        if name.endswith("_extra_state"):
            facts.update(decode_settings(state[name]))
    for name in ("pixel_mean", "pixel_std"):
        if "_extra_state" in state and name in state:  # float32 has seven digits
            facts[name] = [float(f"{x:.7g}") for x in state[name].flatten().tolist()]
    return {key: facts[name] for name, key in _STATE_KEYS.items() if facts.get(name) is not None}


def parse_keys(options: Sequence[str]) -> dict[str, Any]:
    """Parse KEY VALUE pairs of ``CARRIED_KEYS`` from a command line.

    Raises:
        ValueError: a key without a value, an unknown key, or a value of a wrong type.
    """
    if len(options) % 2:
        raise ValueError(f"--opts needs pairs of KEY VALUE; {options[-1]} has no value.")
    unknown = [key for key in options[0::2] if key not in CARRIED_KEYS]
    if unknown:
        raise ValueError(
            f"--opts {', '.join(unknown)}: not stored with weights. The keys that are: "
            f"{', '.join(CARRIED_KEYS)}."
        )
    cfg = get_cfg()
    add_fcos_config(cfg)
    cfg.merge_from_list(list(options))
    return collect_keys(cfg, options[0::2])
