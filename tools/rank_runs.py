"""Train a recipe many times with one choice changed a run, and print what each choice gave."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from fcos_d2.engine.ranking import compare, execute, is_done, read_plan
from fcos_d2.files import atomic_path

TRAIN_NET = Path(__file__).resolve().parents[1] / "train_net.py"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print the table and return the exit status: 1 if a run failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("plan", metavar="PLAN.yaml", help="as docs/results/r18_voc_choices.yaml")
    parser.add_argument("--output", type=Path, default=Path("output/ranking"), metavar="DIR")
    parser.add_argument("--table", type=Path, metavar="FILE.md", help="write the table there too")
    parser.add_argument("--only-table", action="store_true", help="make no run")
    parser.add_argument(
        "opts", nargs="*", metavar="KEY VALUE", help="over the plan's opts, as MODEL.WEIGHTS FILE"
    )
    args = parser.parse_intermixed_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        runs = read_plan(args.plan, args.opts)
        if not args.only_table:
            execute((sys.executable, str(TRAIN_NET)), runs, args.output)
        table = compare(runs, args.output).to_markdown(index=False, floatfmt=".1f")
    except (OSError, ValueError) as error:
        print("rank_runs:", error, file=sys.stderr)
        return 1
    print(table)
    if args.table:
        with atomic_path(args.table) as temporary:
            temporary.write_text(table + "\n", encoding="utf-8")
    done = [is_done(run, args.output / run.folder) for run in runs]
    return 0 if args.only_table or all(done) else 1


if __name__ == "__main__":
    sys.exit(main())
