"""Run a training command in one process or in several, on one machine or more."""

import argparse
import os
from collections.abc import Callable

import torch
import torch.distributed as dist
from detectron2.engine import launch as detectron2_launch
from detectron2.utils import comm

# What torchrun, and others that start processes as it does, tell each process.
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def launch(main: Callable[[argparse.Namespace], object], args: argparse.Namespace) -> None:
    """Call ``main(args)`` once in each process of the run.

    Under ``torchrun`` this process is one of them and joins the others, over NCCL where there is
    CUDA and over Gloo on the CPU. Otherwise Detectron2 starts ``args.num_gpus`` processes here.

    Args:
        main: a function of a module, so that other processes can be given it.
        args: Detectron2's ``default_argument_parser`` made them.

    Raises:
        ValueError: more processes than CUDA devices, or a number of processes that torchrun has
            chosen already.
    """
    if all(name in os.environ for name in _TORCHRUN):
        _join_torchrun(main, args)
        return
    if args.num_gpus * args.num_machines > 1:
        _check_devices(args.num_gpus, f"--num-gpus {args.num_gpus}")
    detectron2_launch(
        main,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )


def _join_torchrun(main: Callable[[argparse.Namespace], object], args: argparse.Namespace) -> None:
    local_rank, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if args.num_gpus > 1 or args.num_machines > 1:
        raise ValueError(
            "Under torchrun leave --num-gpus and --num-machines out: torchrun's --nproc-per-node "
            "and --nnodes say how many processes there are."
        )
    if torch.cuda.is_available():
        _check_devices(local_size, f"torchrun --nproc-per-node {local_size}")
        torch.cuda.set_device(local_rank)
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    # Detectron2 asks it for the rank on this machine. Version 0.5 has no public way to make it,
    # and needs it for nothing that FCOS does.
    if hasattr(comm, "create_local_process_group"):
        comm.create_local_process_group(local_size)
    main(args)
    # Not in a `finally`: after an error this process has to end, for torchrun then ends the
    # others, and an orderly farewell might wait for them.
    dist.destroy_process_group()


def _check_devices(needed: int, asked: str) -> None:
    found = torch.cuda.device_count()
    if needed > found:
        raise ValueError(
            f"{asked} needs {needed} CUDA devices on this machine, which has {found}. Several "
            "processes on the CPU: CUDA_VISIBLE_DEVICES='' torchrun --nproc-per-node N "
            "train_net.py ..."
        )
