"""From command line arguments to a checked config."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from logging.handlers import MemoryHandler

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from ..checkpoint import FCOSCheckpointer, apply_checkpoint_keys
from ..config import add_fcos_config, check_training, set_num_classes, update_names
from ..data import class_names, load_records, register_source
from .commands import record_command
from .hooks import check_hooks
from .scaling import scale_to_batch_size

logger = logging.getLogger(__name__)


def load_cfg(config_file: str, opts: list[str]) -> CfgNode:
    """Read a yaml recipe, override it with KEY VALUE pairs and choose a device that is there.

    Raises:
        ValueError: ``config_file`` is a Python file, or the config.yaml of a run of one.
    """
    if config_file.endswith(".py"):
        raise ValueError(
            f"--config-file {config_file} is a lazy config: train and evaluate it by "
            "tools/lazyconfig_train_net.py, or name a yaml file."
        )
    cfg = get_cfg()
    add_fcos_config(cfg)
    if config_file:
        cfg.merge_from_file(config_file)
    cfg.merge_from_list(opts)
    update_names(cfg)
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
    names = list(dict.fromkeys((*(() if eval_only else cfg.DATASETS.TRAIN), *cfg.DATASETS.TEST)))
    needed = "DATASETS.TEST" if eval_only else "DATASETS.TRAIN"
    if not (cfg.DATASETS.TEST if eval_only else cfg.DATASETS.TRAIN):
        raise ValueError(f"{needed} is empty: name a source of images.")
    classes = shared_class_names(names, skip_bad_boxes=cfg.DATASETS.SKIP_BAD_BOXES)
    set_num_classes(cfg, names[0], classes)
    return classes


def shared_class_names(names: Sequence[str], *, skip_bad_boxes: bool = False) -> list[str]:
    """Register and read data sources, and return their class names, which must be the same.

    Raises:
        ValueError: a source that can't be used (:class:`fcos_d2.data.DataError`), or one with other
            classes than the first.
    """
    for name in names:
        register_source(name)
        records = load_records(name, skip_bad_boxes=skip_bad_boxes)
        logger.info("%s: %d images", name, len(records))
    first = class_names(names[0])
    for name in names[1:]:
        if class_names(name) != first:
            raise ValueError(_class_mismatch(names[0], first, name, class_names(name)))
    return first


def setup(args: argparse.Namespace) -> CfgNode:
    """Build the frozen config of a run, check its data and start logging to its output folder.

    Everything that can be wrong with the config or the data is found before the output folder is
    touched.
    """
    setup_logger(distributed_rank=comm.get_rank(), name="fcos_d2")
    # What is said before there is an output folder waits for its log.
    early = MemoryHandler(capacity=10_000, flushLevel=logging.CRITICAL + 1)
    package_logger = logging.getLogger("fcos_d2")
    package_logger.addHandler(early)
    try:
        cfg = _build_cfg(args)
        default_setup(cfg, args)
        _log_to_file(package_logger, early, cfg.OUTPUT_DIR)
        if comm.is_main_process():
            record_command(cfg.OUTPUT_DIR, sys.argv, cfg.MODEL.DEVICE)
    finally:
        package_logger.removeHandler(early)
    return cfg


def _build_cfg(args: argparse.Namespace) -> CfgNode:
    cfg = load_cfg(args.config_file, args.opts)
    keep = args.opts[0::2]
    # Where the checkpointer will look: in the run that is resumed, else in MODEL.WEIGHTS.
    run = FCOSCheckpointer(torch.nn.Identity(), cfg.OUTPUT_DIR)
    last = run.get_checkpoint_file() if args.resume else ""
    apply_checkpoint_keys(
        cfg,
        last or cfg.MODEL.WEIGHTS,
        training=not (last or args.eval_only),
        keep=keep,
    )
    prepare_datasets(cfg, args.eval_only)
    if not args.eval_only:
        check_training(cfg)
        check_hooks(cfg)
    scale_to_batch_size(cfg, keep=keep)
    cfg.freeze()
    return cfg


def _log_to_file(package_logger: logging.Logger, early: MemoryHandler, output_dir: str) -> None:
    """Send this package's messages, the early ones too, to the log of the output folder."""
    for handler in package_logger.handlers[:]:
        if isinstance(handler, logging.FileHandler):  # of an earlier run in this process
            package_logger.removeHandler(handler)
            handler.close()
    if not comm.is_main_process():
        # A logger without any handler would print warnings, which the main process has printed.
        package_logger.addHandler(logging.NullHandler())
        return
    handler = logging.FileHandler(os.path.join(output_dir, "log.txt"))
    handler.setFormatter(
        logging.Formatter("[%(asctime)s] %(name)s %(levelname)s: %(message)s", "%m/%d %H:%M:%S")
    )
    early.setTarget(handler)
    early.flush()
    package_logger.addHandler(handler)


def _class_mismatch(name: str, names: list[str], other: str, other_names: list[str]) -> str:
    return (
        "All data sets of a run need the same classes in the same order.\n"
        f"  {name} ({len(names)}): {', '.join(names)}\n"
        f"  {other} ({len(other_names)}): {', '.join(other_names)}\n"
        "Put the same classes.txt (one name a line) into both folders, or give the json files the "
        "same categories."
    )
