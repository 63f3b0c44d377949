"""Run a training command in one or several processes, then draw its report."""

import argparse
import contextlib
import logging
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from detectron2.engine import launch as detectron2_launch
from detectron2.utils.logger import setup_logger

from ..files import COMMANDS_FILE
from ..visualization.report import write_report
from .compat import create_local_process_group
from .setup import read_cfg

# Set for each process by torchrun and by launchers compatible with it.
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")

logger = logging.getLogger(__name__)


def launch(
    main: Callable[[argparse.Namespace], object],
    args: argparse.Namespace,
    output_dir: str | None = None,
) -> None:
    """Call ``main(args)`` once in each process of the run, then draw the report of the run.

    Under ``torchrun`` this process is one of them and joins the others, over NCCL with CUDA and
    over Gloo on the CPU. Otherwise Detectron2 starts ``args.num_gpus`` processes.

    The report (:func:`write_report`) is drawn once, after ``main`` has returned, failed or been
    interrupted and no rank can wait for it; only if :func:`fcos_d2.engine.setup` has prepared
    OUTPUT_DIR. If torchrun kills this process because another rank failed, there is none.

    Args:
        main: a module-level function, so that other processes can import it.
        args: of Detectron2's ``default_argument_parser``.
        output_dir: folder of the run; None for OUTPUT_DIR of the yaml recipe.

    Raises:
        ValueError: more processes than CUDA devices, or a number of processes under torchrun.
        Exception: whatever ``main`` raises.
    """
    if all(name in os.environ for name in _TORCHRUN):
        run, main_process = _run_under_torchrun, os.environ["RANK"] == "0"
    else:
        run, main_process = _run, args.machine_rank == 0
    if not main_process:
        run(main, args)
        return
    with _report_at_end(output_dir or read_cfg(args.config_file, args.opts).OUTPUT_DIR):
        run(main, args)


def _run(main: Callable[[argparse.Namespace], object], args: argparse.Namespace) -> None:
    if args.num_gpus * args.num_machines == 1:
        main(args)
        return
    _check_devices(args.num_gpus, f"--num-gpus {args.num_gpus}")
    try:
        detectron2_launch(
            main,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )
    finally:
        for process in multiprocessing.active_children():  # after Ctrl-C they close their files
            process.join(timeout=60)


def _run_under_torchrun(
    main: Callable[[argparse.Namespace], object], args: argparse.Namespace
) -> None:
    local_rank, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if args.num_gpus > 1 or args.num_machines > 1:
        raise ValueError(
            "--num-gpus and --num-machines cannot be used under torchrun: its --nproc-per-node and "
            "--nnodes set the number of processes."
        )
    if torch.cuda.is_available():
        _check_devices(local_size, f"torchrun --nproc-per-node {local_size}")
        torch.cuda.set_device(local_rank)
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    create_local_process_group(local_size)
    try:
        main(args)
    finally:
        # When a rank has failed, torchrun ends the others: let the main process draw its report.
        # Ctrl-C reaches each rank twice, from the terminal and from torchrun.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
    # Not after an error: destroy_process_group() could wait for a rank that is stuck.
    dist.destroy_process_group()


def _check_devices(needed: int, option: str) -> None:
    found = torch.cuda.device_count()
    if needed > found:
        raise ValueError(
            f"{option} needs {needed} CUDA devices on this machine, which has {found}. To use "
            "several processes on the CPU: CUDA_VISIBLE_DEVICES='' torchrun --nproc-per-node N "
            "train_net.py ..."
        )


@contextlib.contextmanager
def _report_at_end(output_dir: str) -> Iterator[None]:
    """Draw the report of a run after the block, whatever its end, if a run used the folder.

    ``setup`` may run in other processes. Its trace is the command that it records.
    """
    commands = Path(output_dir) / COMMANDS_FILE
    before = _content(commands)
    try:
        yield
    finally:
        if _content(commands) != before:
            if not logging.getLogger("fcos_d2").handlers:
                setup_logger(distributed_rank=0, name="fcos_d2")
            try:
                for path in write_report(output_dir):
                    print(f"Wrote {path}")
            except Exception:
                logger.exception("No report of %s:", output_dir)


def _content(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""
