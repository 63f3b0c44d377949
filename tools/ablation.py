"""One-change-at-a-time ablations: train a recipe once per choice and print a table of the results.

Usage:
    python tools/ablation.py PLAN.yaml [--output DIR] [--table FILE] [--only-table] [KEY VALUE ...]
"""

import argparse
import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import yaml
from tqdm import tqdm

from fcos_d2.files import atomic_path, dataset_slug, write_json

TRAIN_NET = Path(__file__).resolve().parents[1] / "train_net.py"
logger = logging.getLogger(__name__)

BASE = "base"
METRICS = ("AP", "AP50", "AP75")
_OPTIONS = "options.json"  # in the folder of a run that came to its end
_KEYS = {"config_file": str, "opts": dict, "base_seeds": list, "runs": list}


class Run(NamedTuple):
    """One training run.

    Attributes:
        choice: what it does differently, in words; ``"base"`` for nothing.
        config_file: the recipe.
        opts: config keys and values, the plan's own included.
        seed: of the weights, the order of the images and their augmentation.
    """

    choice: str
    config_file: str
    opts: dict[str, Any]
    seed: int

    @property
    def folder(self) -> str:
        """Name of its output folder."""
        return f"{dataset_slug(self.choice.replace(' ', '_'))}-seed{self.seed}"

    @property
    def options(self) -> dict[str, Any]:
        """All that it was made with, as its options.json has it."""
        options = {"config_file": self.config_file, **self.opts, "SEED": self.seed}
        return json.loads(json.dumps(options))


def read_plan(path: str | os.PathLike, overrides: Sequence[str] = ()) -> list[Run]:
    """Read a plan of runs.

    A YAML file with ``config_file`` (a recipe), ``opts`` (keys and values of every run),
    ``base_seeds`` (the base is run once with each) and ``runs``: a list of ``choice`` (words),
    ``opts`` (what it changes) and, optionally, ``seeds`` (the first of the base's by default).

    Args:
        path: of the file.
        overrides: KEY VALUE pairs that go before the plan's ``opts``, and not before a run's.

    Returns:
        The runs, those of the base first.

    Raises:
        ValueError: the file is no such plan, or a key has no value; the message names the key.
    """
    if len(overrides) % 2:
        raise ValueError(f"Options are pairs of KEY VALUE; {overrides[-1]} has no value.")
    try:
        plan = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML ({error}).") from error
    for key, kind in _KEYS.items():
        if not isinstance(plan, dict) or not isinstance(plan.get(key), kind):
            raise ValueError(f"{path}: {key!r} has to be there, as a {kind.__name__}.")
    if not plan["base_seeds"]:
        raise ValueError(f"{path}: 'base_seeds' is empty: the base needs a run to compare with.")
    common = {**plan["opts"], **dict(zip(overrides[0::2], overrides[1::2], strict=True))}
    config_file = plan["config_file"]
    runs = [Run(BASE, config_file, common, seed) for seed in plan["base_seeds"]]
    for item in plan["runs"]:
        if not isinstance(item, dict) or not {"choice", "opts"} <= item.keys():
            raise ValueError(f"{path}: a run needs 'choice' and 'opts', but one is {item!r}.")
        if not isinstance(item["opts"], dict):
            raise ValueError(f"{path}: the 'opts' of {item['choice']!r} are no KEY: VALUE pairs.")
        opts = {**common, **item["opts"]}
        seeds = item.get("seeds", plan["base_seeds"][:1])
        if not isinstance(seeds, list) or not seeds:
            raise ValueError(f"{path}: the 'seeds' of {item['choice']!r} are no list of numbers.")
        runs += [Run(str(item["choice"]), config_file, opts, seed) for seed in seeds]
    folders = [run.folder for run in runs]
    repeated = sorted({name for name in folders if folders.count(name) > 1})
    if repeated:
        raise ValueError(f"{path}: two runs would go to the folder {repeated[0]}: rename one.")
    return runs


def execute(command: Sequence[str], runs: Sequence[Run], output_dir: str | os.PathLike) -> None:
    """Make the runs one after the other, each in a process and a folder of its own.

    A run that is done is passed over, so a stopped ranking goes on where it was. One that fails
    is reported, and the next one begins.

    Args:
        command: what trains, as in ``("python", "train_net.py")``.
        runs: see :func:`read_plan`.
        output_dir: holds a folder a run.

    Raises:
        ValueError: a folder holds a run with other options.
    """
    for run in tqdm(runs, unit="run"):
        folder = Path(output_dir) / run.folder
        if is_done(run, folder):
            continue
        folder.mkdir(parents=True, exist_ok=True)
        pairs = {**run.opts, "SEED": run.seed, "OUTPUT_DIR": folder}
        arguments = [str(x) for pair in pairs.items() for x in pair]
        with open(folder / "console.txt", "w", encoding="utf-8") as console:
            done = subprocess.run(
                [*command, "--config-file", run.config_file, *arguments],
                stdout=console,
                stderr=subprocess.STDOUT,
            )
        if done.returncode:
            logger.error("%s failed: see %s", run.folder, folder / "console.txt")
        else:
            write_json(folder / _OPTIONS, run.options, indent=2)


def is_done(run: Run, folder: Path) -> bool:
    """Tell whether a run came to its end; what a failed or stopped one left does not count.

    Raises:
        ValueError: the folder holds a run with other options.
    """
    path = folder / _OPTIONS
    if not path.is_file():
        return False
    if json.loads(path.read_text(encoding="utf-8")) != run.options:
        raise ValueError(
            f"{folder} holds a run with other options (its {_OPTIONS}): move it away, or give "
            "the choice another name."
        )
    return True


def compare(runs: Sequence[Run], output_dir: str | os.PathLike) -> pd.DataFrame:
    """Return what each choice gave, best first.

    Returns:
        One row a choice: ``choice``, ``seeds`` (number of runs that are done), the means over them
        of AP, AP50 and AP75 on the first test set in percent, ``change`` (of AP50 to that of the
        base) and ``spread`` (largest less smallest AP50 of the seeds). A choice of which no run is
        done, or that diverged, has nan.

    Raises:
        OSError: a run that is done has lost its results.
        ValueError: a folder holds a run with other options.
    """
    rows = []
    for choice in dict.fromkeys(run.choice for run in runs):
        folders = [
            folder
            for run in runs
            if run.choice == choice and is_done(run, folder := Path(output_dir) / run.folder)
        ]
        table = pd.DataFrame(map(read_metrics, folders), columns=METRICS, dtype=float)
        spread = table.AP50.max() - table.AP50.min() if len(table) > 1 else float("nan")
        rows.append({"choice": choice, "seeds": len(table), **table.mean(), "spread": spread})
    result = pd.DataFrame(rows)
    change = result.AP50 - result.AP50[result.choice == BASE].item()
    result.insert(result.columns.get_loc("spread"), "change", change)
    return result.sort_values("AP50", ascending=False, ignore_index=True)


def read_metrics(folder: Path) -> dict[str, float]:
    """Read AP, AP50 and AP75 of the first test set of a run that is done."""
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    slug = dataset_slug(config["DATASETS"]["TEST"][0])
    path = folder / "inference" / slug / "evaluation.json"
    table = json.loads(path.read_text(encoding="utf-8"))["bbox"]
    return {key: table[key] for key in METRICS}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print the table and return the exit status: 1 if a run failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
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
        print("ablation:", error, file=sys.stderr)
        return 1
    print(table)
    if args.table:
        with atomic_path(args.table) as temporary:
            temporary.write_text(table + "\n", encoding="utf-8")
    done = [is_done(run, args.output / run.folder) for run in runs]
    return 0 if args.only_table or all(done) else 1


if __name__ == "__main__":
    sys.exit(main())
