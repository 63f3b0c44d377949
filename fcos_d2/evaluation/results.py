"""Result files of evaluations and of training: names, writing and reading."""

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files import write_json

PREDICTIONS_FILE = "coco_instances_results.json"
TABLES_FILE = "evaluation.json"
METRICS_FILE = "metrics.json"  # of Detectron2's JSONWriter
PROPOSALS_FILE = "box_proposals.pkl"  # of Detectron2's COCOEvaluator

logger = logging.getLogger(__name__)


def write_results(
    folder: str | os.PathLike, predictions: Sequence[dict], tables: dict[str, Any]
) -> None:
    """Write predictions, with ``category_ids`` of the tables for their class ids, and tables."""
    ids = tables["category_ids"]
    results = [{**item, "category_id": ids[item["category_id"]]} for item in predictions]
    write_json(Path(folder) / PREDICTIONS_FILE, results)
    write_json(Path(folder) / TABLES_FILE, tables, indent=2)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): evaluate again") from error


def read_tables(folder: str | os.PathLike) -> dict[str, Any]:
    """Read ``evaluation.json``.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: it is not JSON, or lacks the dataset, class names or category ids.
    """
    path = Path(folder) / TABLES_FILE
    tables = _read_json(path)
    for key in ("dataset", "class_names", "category_ids"):
        if not isinstance(tables, dict) or key not in tables:
            raise ValueError(f"{path} has no {key!r}: evaluate again")
    return tables


def read_predictions(folder: str | os.PathLike) -> list[dict]:
    """Read the predictions beside an ``evaluation.json``, with class ids in [0, K).

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not in the format of :func:`write_results`.
    """
    class_ids = {category: k for k, category in enumerate(read_tables(folder)["category_ids"])}
    path = Path(folder) / PREDICTIONS_FILE
    predictions = _read_json(path)
    try:
        unknown = {item["category_id"] for item in predictions} - class_ids.keys()
    except (KeyError, TypeError) as error:
        message = f"{path} is not a list of predictions ({error!r}): evaluate again"
        raise ValueError(message) from error
    if unknown:
        raise ValueError(
            f"{path} has category id {min(unknown)}, which is not in {TABLES_FILE}: evaluate again"
        )
    return [{**item, "category_id": class_ids[item["category_id"]]} for item in predictions]


def read_metrics(metrics_json: str | os.PathLike) -> list[dict]:
    """Read ``metrics.json``: one dict per iteration, in ascending order.

    Where the iteration decreases, the run was resumed (or restarted) from there, so earlier lines
    from that iteration on are dropped. Lines of one iteration are merged, the last value wins.
    Incomplete lines, left by a killed run, are skipped with a warning.

    Raises:
        FileNotFoundError: the file is missing.
    """
    history: dict[int, dict] = {}
    for number, text in enumerate(Path(metrics_json).read_text(encoding="utf-8").split("\n"), 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            iteration = int(line["iteration"])
        except (ValueError, KeyError, TypeError):
            logger.warning("%s: line %d is incomplete, skipped", metrics_json, number)
            continue
        if iteration < max(history, default=iteration):
            history = {key: kept for key, kept in history.items() if key < iteration}
        history.setdefault(iteration, {}).update(line)
    return list(history.values())


def proposal_recall(history: Sequence[dict], dataset: str | None = None) -> dict[str, float]:
    """Return the last average recalls of proposals, in percent.

    Args:
        history: as from :func:`read_metrics`.
        dataset: the test set; None if the run has only one, whose name Detectron2 does not write.
    """
    prefix = f"{dataset}/box_proposals/" if dataset else "box_proposals/"
    values = {key: value for line in history for key, value in line.items()}
    return {k.removeprefix(prefix): x for k, x in values.items() if k.startswith(prefix)}
