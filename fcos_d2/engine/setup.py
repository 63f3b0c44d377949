"""Build a checked config from command line arguments."""

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


def read_cfg(config_file: str, opts: Sequence[str]) -> CfgNode:
    """Read a yaml recipe ("" for the defaults) and override it with KEY VALUE pairs.

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
    cfg.merge_from_list(list(opts))
    update_names(cfg)
    return cfg


def load_cfg(config_file: str, opts: Sequence[str]) -> CfgNode:
    """Read a config as :func:`read_cfg` does, for the CPU if there is no CUDA device."""
    cfg = read_cfg(config_file, opts)
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        logger.warning("No CUDA device: running on the CPU.")
        cfg.MODEL.DEVICE = "cpu"
    return cfg


class RunConfig:
    """The config of a command: which of recipe, checkpoint and command line sets a key.

    Keys set on the command line (``overrides``) are final. The keys that a checkpoint was made for
    override the recipe, and scaling to the batch size adapts the recipe's schedule.
    """

    def __init__(self, config_file: str, opts: Sequence[str]):
        """Load the recipe and the KEY VALUE pairs of the command line into ``cfg``."""
        self.cfg = load_cfg(config_file, opts)
        self.overrides = list(opts[0::2])

    def apply_checkpoint(self, path: str, *, training: bool) -> None:
        """Set the keys that a checkpoint was made for; see :func:`apply_checkpoint_keys`."""
        apply_checkpoint_keys(self.cfg, path, training=training, keep=self.overrides)

    def scale_to_batch_size(self) -> None:
        """Adapt the schedule to SOLVER.IMS_PER_BATCH; see :func:`scale_to_batch_size`."""
        scale_to_batch_size(self.cfg, keep=self.overrides)


def prepare_datasets(cfg: CfgNode, eval_only: bool = False) -> list[str]:
    """Register and read the sources of ``cfg.DATASETS``, check classes and set NUM_CLASSES.

    Args:
        cfg: not frozen; MODEL.FCOS.NUM_CLASSES is set.
        eval_only: skip DATASETS.TRAIN, which may be missing.

    Returns:
        The class names that all data sets share.

    Raises:
        ValueError: no data set, bad data (:class:`fcos_d2.data.DataError`), data sets with
            different classes, or another MODEL.FCOS.NUM_CLASSES than -1 and their number.
    """
    key = "TEST" if eval_only else "TRAIN"
    if not cfg.DATASETS[key]:
        raise ValueError(f"DATASETS.{key} is empty: name a source of images.")
    names = list(dict.fromkeys((*(() if eval_only else cfg.DATASETS.TRAIN), *cfg.DATASETS.TEST)))
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

    Config and data are checked before the output folder is created.
    """
    setup_logger(distributed_rank=comm.get_rank(), name="fcos_d2")
    # Keeps messages for the log file until there is an output folder.
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
    run = RunConfig(args.config_file, args.opts)
    cfg = run.cfg
    # The checkpointer will load the last checkpoint of a resumed run, else MODEL.WEIGHTS.
    folder = FCOSCheckpointer(torch.nn.Identity(), cfg.OUTPUT_DIR)
    last = folder.get_checkpoint_file() if args.resume else ""
    run.apply_checkpoint(last or cfg.MODEL.WEIGHTS, training=not (last or args.eval_only))
    prepare_datasets(cfg, args.eval_only)
    if not args.eval_only:
        check_training(cfg)
        check_hooks(cfg)
    run.scale_to_batch_size()
    cfg.freeze()
    return cfg


def _log_to_file(package_logger: logging.Logger, early: MemoryHandler, output_dir: str) -> None:
    """Write this package's messages, early ones included, to ``log.txt``."""
    for handler in package_logger.handlers[:]:
        if isinstance(handler, logging.FileHandler):  # of an earlier run in this process
            package_logger.removeHandler(handler)
            handler.close()
    if not comm.is_main_process():
        # Without any handler, logging would print warnings, and the main process prints them.
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
        "All data sets of a run must have the same classes in the same order.\n"
        f"  {name} ({len(names)}): {', '.join(names)}\n"
        f"  {other} ({len(other_names)}): {', '.join(other_names)}\n"
        "Put the same classes.txt (one name per line) into both folders, or give the json files "
        "the same categories."
    )
