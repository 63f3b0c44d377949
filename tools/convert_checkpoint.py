"""Convert an FCOS checkpoint of torchvision, Detectron2, AdelaiDet or mmdet to this package.

MODEL.WEIGHTS reads such files directly; the tool prints their content and sets keys that can't be
inferred from them.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fcos_d2.checkpoint import Converted, convert_file, parse_keys, status_table
from fcos_d2.checkpoint.libraries import LIBRARIES


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
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
        help="library that wrote SRC; auto recognises it by the names of the tensors",
    )
    parser.add_argument(
        "--classes", type=Path, metavar="FILE", help="class names in order, one per line"
    )
    parser.add_argument("--partial", action="store_true", help="take only the tensors that fit")
    parser.add_argument(
        "--opts",
        nargs=argparse.REMAINDER,
        default=[],
        help="KEY VALUE pairs, instead of the values inferred from SRC",
    )
    return parser


def read_names(path: Path | None) -> list[str] | None:
    """Read class names, one per line; blank lines are skipped."""
    if path is None:
        return None
    names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    names = [name for name in names if name]
    if not names:
        raise ValueError(f"--classes {path}: the file has no class name.")
    return names


def describe(converted: Converted) -> str:
    """Return a report: status of the tensors, keys, class names, remarks."""
    keys = "\n".join(f"  {key} {value!r}" for key, value in sorted(converted.cfg.items()))
    names = f"{len(converted.class_names)} classes: {', '.join(converted.class_names)}"
    if not converted.class_names:
        number = len(converted.class_indices)
        names = f"{number} classes without names; set them by --classes FILE"
    table = status_table(converted.tensors)
    stored = f"Keys stored with the weights:\n{keys}"
    return "\n\n".join([f"FCOS of {converted.source}", table, stored, names, *converted.notes])


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert, print a report and return the exit status."""
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
    except (OSError, ValueError, RuntimeError) as error:  # PyTorch: a full disk is a RuntimeError
        print("convert_checkpoint:", " ".join(str(error).split()), file=sys.stderr)
        return 1
    print(f"{describe(converted)}\n\nWrote {args.dst}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
