"""One-change-at-a-time ablations: train a recipe once per choice and print a table of the results.

Usage:
    python tools/ablation.py PLAN.yaml [--output DIR] [--table FILE] [--only-table] [KEY VALUE ...]
"""

import argparse
import dataclasses
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
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from tqdm import tqdm

from fcos_d2.files import atomic_path, dataset_slug, write_json

TRAIN_NET = Path(__file__).resolve().parents[1] / "train_net.py"
logger = logging.getLogger(__name__)

BASE = "base"
METRICS = ("AP", "AP50", "AP75")
_OPTIONS = "options.json"  # in the folder of a finished run


@dataclasses.dataclass
class Choice:
    """A change to the base: words, config keys and values, seeds (default: the base's first)."""

    choice: str = MISSING
    opts: dict[str, Any] = MISSING
    seeds: list[int] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Plan:
    """A plan of runs: the recipe, keys and values of every run, seeds of the base, and choices."""

    config_file: str = MISSING
    opts: dict[str, Any] = MISSING
    base_seeds: list[int] = MISSING
    runs: list[Choice] = MISSING


class Run(NamedTuple):
    """One training run."""

    choice: str  # its change, in words; "base" for none
    config_file: str  # the recipe
    opts: dict[str, Any]  # config keys and values, including the plan's
    seed: int  # of the weights, the order of the images and their augmentation

    @property
    def folder(self) -> str:
        """Name of its output folder."""
        return f"{dataset_slug(self.choice.replace(' ', '_'))}-seed{self.seed}"

    @property
    def options(self) -> dict[str, Any]:
        """Everything that defines the run, as written to its options.json."""
        options = {"config_file": self.config_file, **self.opts, "SEED": self.seed}
        return json.loads(json.dumps(options))


def read_plan(path: str | os.PathLike, overrides: Sequence[str] = ()) -> list[Run]:
    """Read a YAML file with the fields of :class:`Plan`.

    Args:
        path: of the file.
        overrides: KEY VALUE pairs that override the plan's ``opts``, but not those of a choice.

    Returns:
        The runs, those of the base first.

    Raises:
        ValueError: the file is not such a plan, or a key has no value; the message names the key.
    """
    if len(overrides) % 2:
        raise ValueError(f"Options must be KEY VALUE pairs; {overrides[-1]} has no value.")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Plan), OmegaConf.load(path))
        plan: Any = OmegaConf.to_container(merged, throw_on_missing=True)
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ValueError(
            f"{path} is not a plan with config_file, opts (KEY: VALUE), base_seeds and runs "
            f"(choice, opts, optionally seeds): {' '.join(str(error).split())}"
        ) from error
    if not plan["base_seeds"]:
        raise ValueError(f"{path}: 'base_seeds' is empty: the base needs a run to compare with.")
    overridden = dict(zip(overrides[0::2], overrides[1::2], strict=True))
    base = {"choice": BASE, "opts": {}, "seeds": plan["base_seeds"]}
    runs = [
        Run(
            item["choice"],
            plan["config_file"],
            {**plan["opts"], **overridden, **item["opts"]},
            seed,
        )
        for item in [base, *plan["runs"]]
        for seed in item["seeds"] or plan["base_seeds"][:1]
    ]
    folders = [run.folder for run in runs]
    repeated = sorted({name for name in folders if folders.count(name) > 1})
    if repeated:
        raise ValueError(f"{path}: two runs have the same folder {repeated[0]}: rename one.")
    return runs


def execute(command: Sequence[str], runs: Sequence[Run], output_dir: str | os.PathLike) -> None:
    """Run the runs one after another, each in its own process and folder.

    Finished runs are skipped, so an interrupted ablation continues. A failed run is logged, and
    the next one starts.

    Args:
        command: the training command, such as ``("python", "train_net.py")``.
        runs: see :func:`read_plan`.
        output_dir: contains one folder per run.

    Raises:
        ValueError: a folder contains a run with other options.
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
    """Return whether a run has finished; failed and interrupted runs have not.

    Raises:
        ValueError: the folder contains a run with other options.
    """
    path = folder / _OPTIONS
    if not path.is_file():
        return False
    if json.loads(path.read_text(encoding="utf-8")) != run.options:
        raise ValueError(
            f"{folder} contains a run with other options (see its {_OPTIONS}): move it, or rename "
            "the choice."
        )
    return True


def compare(runs: Sequence[Run], output_dir: str | os.PathLike) -> pd.DataFrame:
    """Return the results of each choice, best first.

    Returns:
        One row per choice: ``choice``, ``seeds`` (number of finished runs), the means over them of
        AP, AP50 and AP75 on the first test set in percent, ``change`` (of AP50 from the base) and
        ``spread`` (largest minus smallest AP50 of the seeds); NaN without a finished run, or if it
        diverged.

    Raises:
        OSError: the results of a finished run are missing.
        ValueError: a folder contains a run with other options.
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
    """Read AP, AP50 and AP75 of the first test set of a finished run."""
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    slug = dataset_slug(config["DATASETS"]["TEST"][0])
    path = folder / "inference" / slug / "evaluation.json"
    table = json.loads(path.read_text(encoding="utf-8"))["bbox"]
    return {key: table[key] for key in METRICS}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the plan, print the table and return the exit status: 1 if a run failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("plan", metavar="PLAN.yaml", help="such as docs/results/r18_voc_choices.yaml")
    add("--output", type=Path, default=Path("output/ranking"), metavar="DIR")
    add("--table", type=Path, metavar="FILE.md", help="write the table to this file too")
    add("--only-table", action="store_true", help="train nothing")
    add("opts", nargs="*", metavar="KEY VALUE", help="override opts, as MODEL.WEIGHTS FILE")
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
