"""Command line of the benchmark: ``python tools/benchmark --json out.json``."""

import argparse
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

if not __package__:  # run as a folder: import this package by its name
    sys.path[0] = str(Path(__file__).resolve().parents[1])
# PyTorch's profiler writes into the progress bar; it reads this variable when it is loaded.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")

# First, because fcos_d2 filters warnings of Detectron2.
from fcos_d2.files import write_json  # noqa: E402

# isort: split
import torch  # noqa: E402

from benchmark.agreement import DisagreementError  # noqa: E402
from benchmark.growth import plot_growth  # noqa: E402
from benchmark.run import PARTS, PRECISIONS, run_benchmark  # noqa: E402
from benchmark.tables import format_report  # noqa: E402
from peers import NAMES  # noqa: E402


def get_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        prog="benchmark",
        description="Time fcos_d2 and other FCOS implementations on the same inputs with the same "
        "weights, in turns, and print a Markdown table. Detections are compared first.",
    )
    add = parser.add_argument
    names, parts = ",".join(NAMES), ",".join(PARTS)
    add("--peers", type=_list_of(NAMES), help=f"some of {names}; default: those installed")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    add("--depth", type=int, choices=(18, 50), default=50, help="of the ResNet; default: 50")
    add("--parts", type=_list_of(PARTS), default=PARTS, help=f"some of {parts}; default: all")
    add(
        "--dtype",
        dest="precisions",
        type=_list_of(PRECISIONS),
        help="precisions of infer and train, some of fp32,tf32,bf16 (tf32 on CUDA only); default: "
        "all on CUDA; on a CPU fp32, and for infer bf16 where the CPU has instructions for it",
    )
    add("--compile", dest="compiled", action="store_true", help="infer and train compiled as well")
    add(
        "--batch",
        dest="batches",
        type=lambda text: [_positive(x) for x in text.split(",")],
        help="images per batch, such as 1,8,32; default: each part's own",
    )
    add(
        "--size",
        dest="sizes",
        type=_size,
        nargs="+",
        metavar="HxW",
        help="image sizes, such as 512x512; default: each part's own (the loader keeps its own)",
    )
    add("--rounds", type=_positive, default=15, help="timed runs of each; default: %(default)s")
    add("--threads", type=_positive, help="CPU threads; default: PyTorch's own")
    add("--json", type=Path, metavar="FILE", help="write the results as data")
    add("--growth", type=Path, metavar="PNG", help="plot the cost over boxes, image side and batch")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the report, and return the exit status."""
    options = get_parser().parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        for path in (options.json, options.growth):
            if path is not None:
                _check_writable(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other libraries' use of old functions
            results = run_benchmark(options)
        if options.json is not None:
            write_json(options.json, results, indent=1)
        if options.growth is not None:
            plot_growth(results["growth"], options.growth)
    except (DisagreementError, OSError, ValueError) as error:
        print("benchmark:", " ".join(str(error).split()), file=sys.stderr)
        return 1
    print(format_report(results), end="")
    return 0


def _check_writable(path: Path) -> None:
    """Raise OSError before anything is measured if no file can be written there."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name a file in it")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent):
        pass


def _list_of(known: Sequence[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = list(dict.fromkeys(text.split(",")))
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{','.join(unknown)!r}: some of {','.join(known)}")
        return names

    return parse


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number from 1 on")
    return int(text)


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None or min(map(int, match.groups())) < 32:
        raise argparse.ArgumentTypeError(f"{text!r}: must be HEIGHTxWIDTH in pixels, at least 32")
    return int(match[1]), int(match[2])


if __name__ == "__main__":
    sys.exit(main())
