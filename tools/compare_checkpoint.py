"""Run a checkpoint in its own library and in fcos_d2: python tools/compare_checkpoint.py FILE."""

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

MEANING = {
    "images": "images whose detections are compared",
    "outputs": "raw head outputs, largest relative difference",
    "detections": "detections of the library",
    "empty_boxes": "of them boxes without area, which fcos_d2 drops",
    "unequal_images": "images with other detections (number, class or order)",
    "boxes": "boxes, largest difference in pixels",
    "scores": "scores, largest difference",
    "training_images": "images whose losses are compared",
    "losses": "the three losses, largest relative difference",
    "gradients": "gradients of the last layers, largest relative difference",
}


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
    values = dataclasses.asdict(parity)
    rows = [(MEANING[k], x if isinstance(x, int) else f"{x:.2g}") for k, x in values.items()]
    print(tabulate.tabulate(rows, disable_numparse=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
