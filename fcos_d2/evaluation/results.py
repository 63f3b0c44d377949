"""The files of an evaluation, read back."""

import json
from pathlib import Path

RESULTS_FILE = "coco_instances_results.json"
TABLES_FILE = "evaluation.json"


def read_results(folder: Path) -> tuple[list[dict], list[str]]:
    """Read the predictions that an evaluation left.

    Args:
        folder: with the evaluator's two files.

    Returns:
        predictions: with class ids from 0, as the records have them; the file carries the category
            ids of the annotation file.
        class_names: by class id.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not what the evaluator writes.
    """
    report, predictions = (read_json(folder / name) for name in (TABLES_FILE, RESULTS_FILE))
    try:
        contiguous = {category: k for k, category in enumerate(report["category_ids"])}
        class_names = report["class_names"]
        unknown = {prediction["category_id"] for prediction in predictions} - set(contiguous)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{folder} holds results of another form ({error!r}): evaluate again"
        ) from error
    if unknown:
        raise ValueError(
            f"{folder / RESULTS_FILE} has category id {min(unknown)}, which is not in "
            f"{TABLES_FILE} beside it: evaluate again"
        )
    for prediction in predictions:
        prediction["category_id"] = contiguous[prediction["category_id"]]
    return predictions, class_names


def read_json(path: Path) -> dict | list:
    """Read a file of results.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): evaluate again") from error
