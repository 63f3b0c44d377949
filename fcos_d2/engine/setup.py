"""From command line arguments to a checked config."""

import argparse
import logging

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from ..config import add_fcos_config
from ..data import class_names, load_records, register_source
from .scaling import scale_to_batch_size

logger = logging.getLogger(__name__)


def load_cfg(config_file: str, opts: list[str]) -> CfgNode:
    """Read a yaml recipe, override it with KEY VALUE pairs and choose a device that is there."""
    cfg = get_cfg()
    add_fcos_config(cfg)
    if config_file:
        cfg.merge_from_file(config_file)
    cfg.merge_from_list(opts)
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        logger.warning("No CUDA device: running on the CPU.")
        cfg.MODEL.DEVICE = "cpu"
    return cfg


def prepare_datasets(cfg: CfgNode, eval_only: bool = False) -> list[str]:
    """Register and read the sources of ``cfg.DATASETS``, check classes and set NUM_CLASSES.

    Args:
        cfg: not frozen; DATASETS and MODEL.FCOS.NUM_CLASSES are read, the latter is set.
        eval_only: leave DATASETS.TRAIN out, which needs not be there to evaluate.

    Returns:
        The class names that all data sets share.

    Raises:
        ValueError: no data set, one that can't be used (:class:`fcos_d2.data.DataError`), data
            sets of different classes, or MODEL.FCOS.NUM_CLASSES is neither -1 nor their number.
    """
    names = [*(() if eval_only else cfg.DATASETS.TRAIN), *cfg.DATASETS.TEST]
    needed = "DATASETS.TEST" if eval_only else "DATASETS.TRAIN"
    if not (cfg.DATASETS.TEST if eval_only else cfg.DATASETS.TRAIN):
        raise ValueError(f"{needed} is empty: name a source of images.")
    for name in names:
        register_source(name, skip_bad_boxes=cfg.DATASETS.SKIP_BAD_BOXES)
    first = class_names(names[0])
    for name in names[1:]:
        if class_names(name) != first:
            raise ValueError(_class_mismatch(names[0], first, name, class_names(name)))
    if cfg.MODEL.FCOS.NUM_CLASSES not in (-1, len(first)):
        raise ValueError(
            f"MODEL.FCOS.NUM_CLASSES is {cfg.MODEL.FCOS.NUM_CLASSES}, but {names[0]} has "
            f"{len(first)} classes ({', '.join(first)}): set it to {len(first)}, or to -1 to take "
            "it from the data."
        )
    cfg.MODEL.FCOS.NUM_CLASSES = len(first)
    for name in names:
        logger.info("%s: %d images", name, len(load_records(name)))
    return first


def setup(args: argparse.Namespace) -> CfgNode:
    """Build the frozen config of a run, check its data and start logging to its output folder.

    Everything that can be wrong with the config or the data is found before the output folder is
    touched.
    """
    rank = comm.get_rank()
    setup_logger(distributed_rank=rank, name="fcos_d2")
    cfg = load_cfg(args.config_file, args.opts)
    prepare_datasets(cfg, args.eval_only)
    scale_to_batch_size(cfg, keep=args.opts[0::2])
    cfg.freeze()
    default_setup(cfg, args)
    # From here on into the output folder's log too. Detectron2 caches its handlers by arguments,
    # so the ones above have to go first.
    logging.getLogger("fcos_d2").handlers.clear()
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=rank, name="fcos_d2")
    return cfg


def _class_mismatch(name: str, names: list[str], other: str, other_names: list[str]) -> str:
    return (
        "All data sets of a run need the same classes in the same order.\n"
        f"  {name} ({len(names)}): {', '.join(names)}\n"
        f"  {other} ({len(other_names)}): {', '.join(other_names)}\n"
        "Put the same classes.txt (one name a line) into both folders, or give the json files the "
        "same categories."
    )
