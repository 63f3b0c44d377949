"""Compare a checkpoint in its own library and in fcos_d2: tools/compare_checkpoint.py FILE."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence

import detectron2
import tabulate
import torch
import torchvision

from fcos_d2.checkpoint.reader import read_checkpoint
from parity import compare_checkpoint
from peers import random_checkpoint


def get_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        description="Compare another library's FCOS with fcos_d2's on random images, with the same "
        "weights: head outputs, detections, losses, gradients."
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("file", nargs="?", help="checkpoint of torchvision or Detectron2 main")
    source.add_argument(
        "--random", choices=("torchvision", "detectron2"), help="random weights of this library"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, print the table, and return the exit status."""
    args = get_parser().parse_args(arguments)
    try:
        if args.random:
            checkpoint = random_checkpoint(args.random, num_classes=20)
        else:
            checkpoint = read_checkpoint(args.file)
        parity = compare_checkpoint(checkpoint, args.random or "auto")
    except (ImportError, OSError, ValueError) as error:
        print("compare_checkpoint:", error, file=sys.stderr)
        return 1
    print(f"torch {torch.__version__}, torchvision {torchvision.__version__}, ", end="")
    print(f"Detectron2 {detectron2.__version__}, {torch.get_num_threads()} CPU threads")
    rows = []
    for field in dataclasses.fields(parity):
        value = getattr(parity, field.name)
        text = value if isinstance(value, int) else f"{value:.2g}"
        rows.append((field.metadata["meaning"], text))
    print(tabulate.tabulate(rows, disable_numparse=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
