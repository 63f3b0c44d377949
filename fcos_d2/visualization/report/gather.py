"""What a run left in its folder, read for the report; what can't be read is said, not raised."""

import datetime
import hashlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from detectron2.config import CfgNode, get_cfg

from ...checkpoint import read_checkpoint
from ...config import add_fcos_config, update_names
from ...data import class_names, load_records
from ...evaluation.records import check_predictions
from ...evaluation.results import RESULTS_FILE, TABLES_FILE, read_json, read_results
from ...files import dataset_slug
from ..curves import read_metrics
from .provenance import read_commands

logger = logging.getLogger(__name__)

BEST_FILE = "model_best.pth"
_CHECKPOINTS = (BEST_FILE, "model_final.pth")
_PROPOSALS_FILE = "box_proposals.pkl"  # Detectron2's name


class Results(NamedTuple):
    """What an evaluation left of one test set.

    ``problems`` tells what is missing, by name of the field.
    """

    dataset: str
    slug: str
    class_names: list[str]
    evaluation: dict[str, Any] | None  # evaluation.json
    records: list[dict] | None  # dataset dicts
    predictions: list[dict] | None  # class ids from 0
    proposals: dict[str, float] | None  # average recalls in percent, of a proposal network
    problems: dict[str, str]


class Best(NamedTuple):
    """The evaluation whose weights are in ``model_best.pth``."""

    metric: str  # as in metrics.json
    value: float
    iteration: int  # counted from 0, as in the names of checkpoints


class Run(NamedTuple):
    """What is in a run's folder; ``problems`` as in :class:`Results`."""

    folder: Path
    name: str
    date: datetime.datetime  # of the latest result
    settings: dict[str, Any]  # config.yaml as it is
    config_text: str
    cfg: CfgNode | None  # the same over the defaults of today's version
    history: list[dict]  # lines of metrics.json
    results: list[Results]
    best: Best | None
    commands: list[dict]  # as read_commands gives them
    problems: dict[str, str]


def gather_run(output_dir: str | os.PathLike) -> Run:
    """Read a run's folder.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds neither config.yaml, metrics.json nor results in inference/.
    """
    folder = Path(output_dir).absolute()
    if not folder.is_dir():
        raise FileNotFoundError(f"{output_dir} is not a folder: give the OUTPUT_DIR of a run")
    left = [folder / "config.yaml", folder / "metrics.json"]
    left = [*left, *folder.glob(f"inference/*/{TABLES_FILE}")]
    left = [path for path in left if path.is_file()]
    if not left:
        raise ValueError(
            f"{output_dir} is no run: it holds neither config.yaml, metrics.json nor "
            f"inference/*/{TABLES_FILE}; give the OUTPUT_DIR of one"
        )
    problems: dict[str, str] = {}
    text, settings = _read_config(folder / "config.yaml", problems)
    cfg = _merge(settings, problems)
    history = _read_history(folder / "metrics.json", problems)
    best = _read_best(folder / BEST_FILE)
    commands = _read_commands(folder, problems)
    names = _test_sets(folder, settings)
    results = [_read_test_set(folder, name, history, len(names) == 1) for name in names]
    date = datetime.datetime.fromtimestamp(max(path.stat().st_mtime for path in left))
    return Run(
        folder,
        folder.name,
        date,
        settings,
        text,
        cfg,
        history,
        results,
        best,
        commands,
        problems,
    )


def load_source(names: Sequence[str]) -> tuple[str, list[dict], list[str]]:
    """The first data set that is at hand.

    Returns:
        Its name, records and class names.

    Raises:
        ValueError: none is; the message tells of each why.
    """
    problems = []
    for name in names:
        try:
            return name, load_records(name, skip_bad_boxes=True), class_names(name)
        except (OSError, ValueError, KeyError) as error:
            problems.append(f"{name}: {error}")
    raise ValueError("No data set is at hand. " + " ".join(problems))


def describe_checkpoints(folder: Path) -> list[dict[str, str]]:
    """Name, size and sha256 of the best and the final checkpoint, of those that are there."""
    found = []
    for name in _CHECKPOINTS:
        path = folder / name
        if path.is_file():
            with open(path, "rb") as file:
                digest = hashlib.sha256()
                while block := file.read(1 << 20):
                    digest.update(block)
            size = f"{path.stat().st_size / 2**20:.1f} MiB"
            found.append({"file": name, "size": size, "sha256": digest.hexdigest()})
    return found


def changed_settings(settings: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Key, value and default of each setting that is not the default.

    Args:
        settings: nested, as in config.yaml.

    Returns:
        Texts, in the order of the keys; a key that has no default has "–" for it.
    """
    defaults = get_cfg()
    add_fcos_config(defaults)
    known = dict(_flatten(yaml.safe_load(defaults.dump())))
    return [
        (key, _shown(value), _shown(known[key]) if key in known else "–")
        for key, value in _flatten(settings)
        if key not in known or known[key] != value
    ]


def _flatten(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    items: list[tuple[str, Any]] = []
    for key, value in tree.items():
        if isinstance(value, dict):
            items += _flatten(value, f"{prefix}{key}.")
        else:
            items.append((f"{prefix}{key}", value))
    return items


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, str) else str(value)


def _read_config(path: Path, problems: dict[str, str]) -> tuple[str, dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
        settings = yaml.safe_load(text)
    except OSError as error:
        problems["config"] = f"{path.name} can't be read ({error.strerror})."
        return "", {}
    except (yaml.YAMLError, UnicodeDecodeError):
        settings = None
    if not isinstance(settings, dict):
        problems["config"] = f"{path.name} is not a config in YAML."
        return text if settings is not None else "", {}
    return text, settings


def _merge(settings: dict[str, Any], problems: dict[str, str]) -> CfgNode | None:
    """The settings over the defaults.

    ``merge_from_file`` is not used: it falls back to a YAML loader that runs code.
    """
    if not settings:
        return None
    cfg = get_cfg()
    add_fcos_config(cfg)
    try:
        cfg.merge_from_other_cfg(CfgNode(settings))
    except (KeyError, ValueError, AssertionError) as error:
        reason = " ".join(map(str, error.args))
        problems["cfg"] = f"config.yaml does not suit this version ({reason})."
        return None
    update_names(cfg)
    return cfg


def _read_history(path: Path, problems: dict[str, str]) -> list[dict]:
    try:
        history = read_metrics(path)
    except OSError:
        problems["history"] = f"{path.name} is missing: this folder saw no training."
        return []
    if not any("total_loss" in line for line in history):
        problems["history"] = f"{path.name} has no line of training (none with 'total_loss')."
    return history


def _read_best(path: Path) -> Best | None:
    try:
        checkpoint = read_checkpoint(str(path), lazy=True)
        return Best(**checkpoint["best"], iteration=checkpoint["iteration"])
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s does not tell the best evaluation: %s", path, error)
    return None


def _read_commands(folder: Path, problems: dict[str, str]) -> list[dict]:
    try:
        return read_commands(folder)
    except (OSError, ValueError) as error:
        problems["commands"] = f"{error}"
        return []


def _test_sets(folder: Path, settings: dict[str, Any]) -> list[str]:
    """DATASETS.TEST; where the config names none, the data sets that left an evaluation."""
    datasets = settings.get("DATASETS")
    names = datasets.get("TEST") if isinstance(datasets, dict) else None
    if names and isinstance(names, (list, tuple)):
        return [str(name) for name in names]
    found = []
    for path in sorted(folder.glob(f"inference/*/{TABLES_FILE}")):
        try:
            found.append(str(read_json(path)["dataset"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("passed over: %s (%s)", path, error)
    return found


def _read_test_set(folder: Path, name: str, history: list[dict], only: bool) -> Results:
    slug = dataset_slug(name)
    place = folder / "inference" / slug
    problems: dict[str, str] = {}
    evaluation = predictions = proposals = None
    names: list[str] = []
    if (place / _PROPOSALS_FILE).is_file() and not (place / TABLES_FILE).is_file():
        proposals = _proposal_recall(history, "" if only else f"{name}/")
        problems["evaluation"] = "A proposal network has neither classes nor a table of AP."
    else:
        try:
            evaluation = read_json(place / TABLES_FILE)
            names = [str(name) for name in evaluation["class_names"]]
            predictions, _ = read_results(place)
        except (OSError, ValueError, KeyError, TypeError) as error:
            what = "predictions" if names else "evaluation"
            problems[what] = _missing(error, place / (RESULTS_FILE if names else TABLES_FILE))
            evaluation = evaluation if names else None
    records = _read_records(name, names, problems)
    if predictions is not None and records is not None:
        try:
            check_predictions(predictions, {x["image_id"] for x in records}, names)
        except (ValueError, KeyError, TypeError) as error:
            problems["predictions"], predictions = f"{error}", None
    return Results(name, slug, names, evaluation, records, predictions, proposals, problems)


def _proposal_recall(history: list[dict], prefix: str) -> dict[str, float]:
    """The last average recalls of proposals in metrics.json."""
    start = f"{prefix}box_proposals/"
    recall: dict[str, float] = {}
    for line in history:
        recall.update({k.removeprefix(start): v for k, v in line.items() if k.startswith(start)})
    return recall


def _read_records(name: str, names: list[str], problems: dict[str, str]) -> list[dict] | None:
    try:
        records = load_records(name, skip_bad_boxes=True)  # a report does not refuse a box
    except (OSError, ValueError, KeyError) as error:
        problems["records"] = f"The images of {name} are not at hand: {error}"
        return None
    if names and class_names(name) != names:
        problems["records"] = (
            f"{name} has other classes now ({', '.join(class_names(name))}) than when it was "
            f"evaluated ({', '.join(names)})."
        )
        return None
    return records


def _missing(error: Exception, path: Path) -> str:
    if isinstance(error, FileNotFoundError):
        return f"{Path(error.filename or path).name} is missing in inference/{path.parent.name}."
    return f"inference/{path.parent.name}/{path.name} can't be used: {error}"
