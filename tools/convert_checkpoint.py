"""Convert a checkpoint of torchvision's, Detectron2's, AdelaiDet's or mmdet's FCOS to this package.

MODEL.WEIGHTS reads such files as they are; the tool shows what is in them, and mends what can't be
told from them.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fcos_d2.checkpoint import Converted, convert_file, parse_keys, status_table
from fcos_d2.checkpoint.libraries import LIBRARIES


def get_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("src", metavar="SRC", help="file to read")
    parser.add_argument("dst", metavar="DST", help="file to write, *.pth")
    parser.add_argument(
        "--from",
        dest="source",
        choices=[*LIBRARIES, "auto"],
        default="auto",
        help="library that wrote it; auto tells it by the names of the tensors",
    )
    parser.add_argument(
        "--classes", type=Path, metavar="FILE", help="names of the classes in order, one a line"
    )
    parser.add_argument(
        "--partial",
        action="store_true",
        help="take the tensors that fit, whatever else there is",
    )
    parser.add_argument(
        "--opts",
        nargs=argparse.REMAINDER,
        default=[],
        help="KEY VALUE pairs that are known better than they can be told from the file",
    )
    return parser


def read_names(path: Path | None) -> list[str] | None:
    """Read class names, one a line; blank lines are passed over."""
    if path is None:
        return None
    names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    names = [name for name in names if name]
    if not names:
        raise ValueError(f"--classes {path}: it has no name in it.")
    return names


def describe(converted: Converted) -> str:
    """Lay out what was converted: tensors, keys, class names, remarks."""
    keys = "\n".join(f"  {key} {value!r}" for key, value in sorted(converted.cfg.items()))
    names = converted.class_names
    listed = f"{len(names)} classes: {', '.join(names)}"
    unnamed = (
        f"{len(converted.class_indices)} classes without names; --classes FILE gives them some"
    )
    return "\n\n".join(
        [
            f"FCOS of {converted.source}\n\n{status_table(converted.tensors)}",
            f"Keys that are written with the weights:\n{keys}",
            listed if names else unnamed,
            *converted.notes,
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert, print what became of everything, and return the exit status."""
    args = get_parser().parse_args(arguments)
    try:
        converted = convert_file(
            args.src,
            args.dst,
            args.source,
            class_names=read_names(args.classes),
            partial=args.partial,
            overrides=parse_keys(args.opts),
        )
    except (OSError, ValueError, RuntimeError) as error:  # a full disk is a RuntimeError of PyTorch
        print("convert_checkpoint:", " ".join(str(error).split()), file=sys.stderr)
        return 1
    print(f"{describe(converted)}\n\nWrote {args.dst}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
