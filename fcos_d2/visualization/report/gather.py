"""Reads the output folder of a run; missing and unreadable inputs are recorded, not raised."""

import datetime
import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pandas as pd
import yaml
from detectron2.config import CfgNode, get_cfg

from ...checkpoint import read_checkpoint
from ...config import add_fcos_config, update_names
from ...data import class_names, load_records
from ...evaluation.records import check_predictions
from ...evaluation.results import (
    METRICS_FILE,
    PROPOSALS_FILE,
    TABLES_FILE,
    proposal_recall,
    read_metrics,
    read_predictions,
    read_tables,
)
from ...files import COMMANDS_FILE, dataset_slug
from ..curves import check_history

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
BEST_FILE = "model_best.pth"
CHECKPOINT_FILES = (BEST_FILE, "model_final.pth")

T = TypeVar("T")


class Evaluation(NamedTuple):
    """Results on one test set; ``problems`` gives the reason for each missing field."""

    dataset: str
    slug: str
    class_names: list[str]
    tables: dict[str, Any] | None  # evaluation.json
    records: list[dict] | None  # dataset dicts
    predictions: list[dict] | None  # class ids in [0, K)
    proposal_recall: dict[str, float] | None  # in percent, of a proposal network
    problems: dict[str, str]


class Best(NamedTuple):
    """The evaluation of the weights in ``model_best.pth``."""

    metric: str  # as in metrics.json
    value: float
    iteration: int  # counted from 0, as in the names of checkpoints


class Run(NamedTuple):
    """Content of the output folder; ``problems`` as in :class:`Evaluation`."""

    folder: Path
    date: datetime.datetime  # of the latest result
    settings: dict[str, Any]  # config.yaml
    config_text: str
    cfg: CfgNode | None  # config.yaml merged into the defaults of this version
    history: list[dict]  # lines of metrics.json
    evaluations: list[Evaluation]
    best: Best | None
    commands: list[dict]  # commands.json, the latest last
    problems: dict[str, str]


def gather_run(output_dir: str | os.PathLike) -> Run:
    """Read the output folder of a run.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: it has neither config.yaml, metrics.json nor results in inference/.
    """
    folder = Path(output_dir).absolute()
    if not folder.is_dir():
        raise FileNotFoundError(f"{output_dir} is not a folder: give the OUTPUT_DIR of a run")
    inputs = [folder / CONFIG_FILE, folder / METRICS_FILE]
    inputs = [path for path in inputs if path.is_file()]
    inputs += folder.glob(f"inference/*/{TABLES_FILE}")
    if not inputs:
        raise ValueError(
            f"{output_dir} is not the output folder of a run: it has neither {CONFIG_FILE}, "
            f"{METRICS_FILE} nor inference/*/{TABLES_FILE}; give the OUTPUT_DIR of a run"
        )
    problems: dict[str, str] = {}
    text, settings = _try(problems, "config", _read_config, folder / CONFIG_FILE) or ("", {})
    cfg = _try(problems, "cfg", _build_cfg, settings) if settings else None
    history = _try(problems, "history", read_metrics, folder / METRICS_FILE) or []
    if "history" not in problems:
        _try(problems, "history", check_history, history)
    datasets = _test_sets(folder, settings)
    skip = cfg is not None and cfg.DATASETS.SKIP_BAD_BOXES
    return Run(
        folder=folder,
        date=datetime.datetime.fromtimestamp(max(path.stat().st_mtime for path in inputs)),
        settings=settings,
        config_text=text,
        cfg=cfg,
        history=history,
        evaluations=[
            _read_evaluation(folder, name, history, len(datasets) == 1, skip) for name in datasets
        ],
        best=_read_best(folder / BEST_FILE),
        commands=_try(problems, "commands", _read_commands, folder / COMMANDS_FILE) or [],
        problems=_relative(problems, folder),
    )


def _relative(problems: dict[str, str], folder: Path) -> dict[str, str]:
    """The problems with paths relative to the folder, since a report is shared with others."""
    return {field: text.replace(f"{folder}{os.sep}", "") for field, text in problems.items()}


def _try(problems: dict[str, str], field: str, read: Callable[..., T], *args: Any) -> T | None:
    """Return ``read(*args)``, or None and the reason in ``problems``."""
    try:
        return read(*args)
    except Exception as error:
        problems[field] = explain(error)
        return None


def explain(error: Exception) -> str:
    """Return the reason of an error in one line; an unexpected one is logged with its traceback."""
    message = " ".join(str(error).split())
    if isinstance(error, FileNotFoundError) and error.filename:
        return f"{error.filename} is missing."
    if isinstance(error, (OSError, ValueError)):
        return message
    logger.error("Unexpected error:", exc_info=error)
    return f"Unexpected error: {type(error).__name__}: {message}"


def load_source(names: Sequence[str], skip_bad_boxes: bool) -> tuple[str, list[dict], list[str]]:
    """Load the first data set that is available.

    Returns:
        Its name, records and class names.

    Raises:
        ValueError: none is available; the message has the reason for each.
    """
    problems: dict[str, str] = {}
    for name in names:
        loaded = _try(problems, name, _load_records, name, skip_bad_boxes)
        if loaded is not None:
            return name, *loaded
    reasons = " ".join(f"{name}: {reason}" for name, reason in problems.items())
    raise ValueError(f"No data set is available. {reasons}")


def _load_records(name: str, skip_bad_boxes: bool) -> tuple[list[dict], list[str]]:
    return load_records(name, skip_bad_boxes=skip_bad_boxes), class_names(name)


def describe_checkpoints(folder: Path) -> list[dict[str, str]]:
    """Name, size and sha256 of the best and the final checkpoint, if present."""
    rows = []
    for path in (folder / name for name in CHECKPOINT_FILES):
        if path.is_file():
            digest = hashlib.sha256()
            with open(path, "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
            size = f"{path.stat().st_size / 2**20:.1f} MiB"
            rows.append({"file": path.name, "size": size, "sha256": digest.hexdigest()})
    return rows


def changed_settings(settings: dict[str, Any]) -> pd.DataFrame:
    """Return the settings that are not the default, as text: key, value and default.

    Args:
        settings: nested, as in config.yaml. A key that has no default gets "–".
    """
    defaults = get_cfg()
    add_fcos_config(defaults)
    known = _flatten(yaml.safe_load(defaults.dump()))
    rows = [
        (key, _repr(value), _repr(known[key]) if key in known else "–")
        for key, value in sorted(_flatten(settings).items())
        if key not in known or known[key] != value
    ]
    return pd.DataFrame(rows, columns=["key", "value", "default"])


def _flatten(settings: dict[str, Any]) -> dict[str, Any]:
    return pd.json_normalize(settings, sep=".").to_dict("records")[0]


def _repr(value: Any) -> str:
    return repr(value) if isinstance(value, str) else str(value)


def _read_config(path: Path) -> tuple[str, dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    try:
        settings = yaml.safe_load(text)
    except yaml.YAMLError:
        settings = None
    if not isinstance(settings, dict):
        raise ValueError(f"{path.name} is not a config in YAML.")
    return text, settings


def _build_cfg(settings: dict[str, Any]) -> CfgNode:
    """Merge settings into the defaults; ``merge_from_file`` could run code from the YAML file."""
    cfg = get_cfg()
    add_fcos_config(cfg)
    try:
        cfg.merge_from_other_cfg(CfgNode(settings))
        update_names(cfg)
    except (KeyError, ValueError, AssertionError) as error:
        reason = " ".join(map(str, error.args))
        raise ValueError(f"{CONFIG_FILE} does not fit this version ({reason}).") from error
    return cfg


def _read_commands(path: Path) -> list[dict]:
    try:
        commands = json.loads(path.read_text(encoding="utf-8"))
        return [{key: item[key] for key in ("command", "environment")} for item in commands]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a list of commands ({error!r}): delete it") from error


def _read_best(path: Path) -> Best | None:
    try:
        checkpoint = read_checkpoint(str(path), lazy=True)
        return Best(**checkpoint["best"], iteration=checkpoint["iteration"])
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s does not name the best evaluation: %s", path, error)
    return None


def _test_sets(folder: Path, settings: dict[str, Any]) -> list[str]:
    """DATASETS.TEST, or without it the data sets that have an evaluation."""
    datasets = settings.get("DATASETS")
    names = datasets.get("TEST") if isinstance(datasets, dict) else None
    if names and isinstance(names, (list, tuple)):
        return [str(name) for name in names]
    found = []
    for path in sorted(folder.glob(f"inference/*/{TABLES_FILE}")):
        try:
            found.append(str(read_tables(path.parent)["dataset"]))
        except (OSError, ValueError) as error:
            logger.warning("skipped: %s", error)
    return found


def _read_evaluation(
    folder: Path, dataset: str, history: list[dict], only: bool, skip_bad_boxes: bool
) -> Evaluation:
    """Read the results on one test set; ``only``: the run has no other one."""
    slug = dataset_slug(dataset)
    place = folder / "inference" / slug
    problems: dict[str, str] = {}
    tables = predictions = recall = None
    names: list[str] = []
    if (place / PROPOSALS_FILE).is_file() and not (place / TABLES_FILE).is_file():
        recall = proposal_recall(history, None if only else dataset)
        problems["tables"] = "A proposal network has neither classes nor AP."
    else:
        tables = _try(problems, "tables", read_tables, place)
    loaded = _try(problems, "records", _load_records, dataset, skip_bad_boxes)
    records, current_names = loaded or (None, [])
    if tables is not None:
        names = [str(name) for name in tables["class_names"]]
        predictions = _try(problems, "predictions", read_predictions, place)
        if records is not None and current_names != names:
            records = None
            problems["records"] = (
                f"The classes of {dataset} have changed: they are {', '.join(current_names)}, "
                f"but were {', '.join(names)} in the evaluation."
            )
    if predictions is not None and records is not None:
        image_ids = {record["image_id"] for record in records}
        _try(problems, "predictions", check_predictions, predictions, image_ids, names)
        predictions = None if "predictions" in problems else predictions
    problems = _relative(problems, folder)
    return Evaluation(dataset, slug, names, tables, records, predictions, recall, problems)
