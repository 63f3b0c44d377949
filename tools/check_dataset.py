"""Check data before training: python tools/check_dataset.py voc:my/folder:train voc:my/folder:val.

Reports every error that would stop training, not just the first; problems that would not stop it
(duplicate images in train and val, duplicate boxes, broken pixels, ...); and how many objects get a
training location. Exit status: 0 without errors, 1 if training would stop or go wrong, 2 for a
wrong command line.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from detectron2.config import CfgNode

from fcos_d2.data.inspection.dataset_report import format_report, inspect_datasets, report_content
from fcos_d2.engine.setup import load_cfg
from fcos_d2.files import write_json
from fcos_d2.visualization.overlays import write_overlays

DEFAULT_CONFIG = Path(__file__).resolve().parents[1] / "configs" / "FCOS_R50_VOC.yaml"


def get_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "arguments",
        nargs="*",
        metavar="SOURCE ... KEY VALUE ...",
        help="sources, as in DATASETS, the first for training, the others for testing (none: the "
        "recipe's DATASETS.TRAIN and TEST); then keys that override the recipe",
    )
    parser.add_argument(
        "--config-file",
        default=str(DEFAULT_CONFIG),
        metavar="FILE",
        help="recipe whose scale, levels and treatment of objects apply; default: %(default)s",
    )
    parser.add_argument(
        "--min-size",
        type=int,
        metavar="N",
        help="shorter edge for the coverage; default: the middle of INPUT.MIN_SIZE_TRAIN",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything as data")
    parser.add_argument("--overlays", type=Path, metavar="DIR", help="draw training locations")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, print the report, and return the exit status."""
    args = get_parser().parse_intermixed_args(arguments)
    sources, opts = split_arguments(args.arguments)
    try:
        cfg = load_cfg(args.config_file, [*opts, "MODEL.DEVICE", "cpu"])
        train, test = _datasets(cfg, sources)
        if args.min_size is not None and args.min_size < 1:
            raise ValueError(f"--min-size is {args.min_size}: it must be 1 or more.")
        report = inspect_datasets(cfg, train, test, min_size=args.min_size)
        print(format_report(report), end="")
        if args.json is not None:
            write_json(args.json, report_content(report), indent=1)
        if args.overlays is not None:
            for path in write_overlays(report, cfg, args.overlays, min_size=args.min_size):
                print(path)
    except (AssertionError, KeyError, OSError, ValueError) as error:
        message = " ".join(str(x) for x in error.args) if error.args else str(error)
        print("check_dataset:", " ".join(message.split()), file=sys.stderr)
        return 2
    return 1 if report.num_errors else 0


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split sources from the KEY VALUE pairs that follow, at the first KEY."""
    for i, argument in enumerate(arguments):
        if re.match(r"[A-Z][A-Z0-9_]*\.[A-Z0-9_.]+$", argument):
            return list(arguments[:i]), list(arguments[i:])
    return list(arguments), []


def _datasets(cfg: CfgNode, sources: Sequence[str]) -> tuple[list[str], list[str]]:
    if sources:
        return list(sources[:1]), list(sources[1:])
    if not cfg.DATASETS.TRAIN:
        raise ValueError("no SOURCE is named and DATASETS.TRAIN is empty")
    return list(cfg.DATASETS.TRAIN), list(cfg.DATASETS.TEST)


if __name__ == "__main__":
    sys.exit(main())
