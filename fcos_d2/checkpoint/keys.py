"""The keys of a config that travel with weights."""

from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from typing import Any

from detectron2.config import CfgNode, get_cfg

from ..config import add_fcos_config, update_names

# What the shapes of tensors don't show and weights need whatever is done with them.
FACT_KEYS = (
    "MODEL.PIXEL_MEAN",
    "MODEL.PIXEL_STD",
    "INPUT.FORMAT",
    "MODEL.RESNETS.STRIDE_IN_1X1",
    "MODEL.FCOS.TOP_BLOCK_IN_FEATURE",
    "MODEL.FCOS.LOCATION_OFFSET",
    "MODEL.FCOS.LOCATION_STEP",
    "MODEL.FCOS.BOX_ACTIVATION",
    "MODEL.FCOS.CENTERNESS_ON_CLS",
)

# What the network is built from. The number of classes is not among them: it goes with the names.
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
    # Training may go on with another: the branch is the same for both.
    "MODEL.FCOS.QUALITY",
    "MODEL.FCOS.CLASS_AGNOSTIC",
)

# How detections are made of predictions.
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
    """Return the values of dotted keys of ``cfg``."""
    return {key: reduce(getattr, key.split("."), cfg) for key in keys}


def set_keys(cfg: CfgNode, keys: Mapping[str, Any]) -> None:
    """Set dotted keys of ``cfg``, which is not frozen.

    Raises:
        ValueError: a value is not of the key's type.
    """
    cfg.merge_from_list([x for pair in keys.items() for x in pair])
    update_names(cfg)


def parse_keys(options: Sequence[str]) -> dict[str, Any]:
    """Read KEY VALUE pairs of a command line into keys that travel with weights.

    Raises:
        ValueError: a key without a value, of another kind, or with a value of a wrong type.
    """
    if len(options) % 2:
        raise ValueError(f"--opts needs pairs of KEY VALUE; {options[-1]} has no value.")
    unknown = [key for key in options[0::2] if key not in CARRIED_KEYS]
    if unknown:
        raise ValueError(
            f"--opts {', '.join(unknown)}: no key that travels with weights. These do: "
            f"{', '.join(CARRIED_KEYS)}."
        )
    cfg = get_cfg()
    add_fcos_config(cfg)
    cfg.merge_from_list(list(options))
    return collect_keys(cfg, options[0::2])
