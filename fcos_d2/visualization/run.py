"""The pictures of an output folder, drawn again from the files it holds."""

import json
import logging
import os
from pathlib import Path

import yaml

from ..data import load_records, register_source
from ..evaluation.evaluator import RESULTS_FILE, TABLES_FILE
from ..files import dataset_slug
from .curves import plot_training_curves
from .detections import draw_detection_grid

logger = logging.getLogger(__name__)


def plot_run(output_dir: str | os.PathLike) -> list[Path]:
    """Draw ``training_curves.png`` and ``detections.png`` from what a run left in its folder.

    Curves need ``metrics.json``. Detections need ``config.yaml`` (for ``DATASETS.TEST``) and
    ``inference/<slug>/`` with the evaluator's two files; the second and further test sets get
    ``detections_<slug>.png``. What is missing is logged, and the other part is drawn.

    Returns:
        The pictures that were drawn.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: it holds nothing to draw.
    """
    output_dir = Path(output_dir)
    if not output_dir.is_dir():
        raise FileNotFoundError(f"{output_dir} is not a folder: give the OUTPUT_DIR of a run")
    pictures = [*_draw_curves(output_dir), *_draw_detections(output_dir)]
    if not pictures:
        raise ValueError(
            f"{output_dir} holds nothing to draw: neither training in metrics.json nor results in "
            "inference/ of the test sets in config.yaml"
        )
    return pictures


def _draw_curves(output_dir: Path) -> list[Path]:
    picture = output_dir / "training_curves.png"
    try:
        plot_training_curves(output_dir / "metrics.json", picture)
    except (FileNotFoundError, ValueError) as error:
        logger.warning("no training curves: %s", error)
        return []
    return [picture]


def _draw_detections(output_dir: Path) -> list[Path]:
    pictures = []
    for name in _test_sets(output_dir / "config.yaml"):
        slug = dataset_slug(name)
        picture = output_dir / (f"detections_{slug}.png" if pictures else "detections.png")
        try:
            predictions, class_names = read_results(output_dir / "inference" / slug)
            register_source(name, skip_bad_boxes=True)  # a picture is no place to refuse a box
            draw_detection_grid(load_records(name), predictions, class_names, picture)
        except (OSError, ValueError) as error:
            logger.warning("no detections of %s: %s", name, error)
            continue
        pictures.append(picture)
    return pictures


def _test_sets(config_yaml: Path) -> list[str]:
    """``DATASETS.TEST`` of a dumped config; nothing, and a warning, where there is none."""
    try:
        config = yaml.safe_load(config_yaml.read_text(encoding="utf-8"))
        names = list(config["DATASETS"]["TEST"])
    except FileNotFoundError:
        logger.warning("no detections: %s is missing", config_yaml)
        return []
    except (yaml.YAMLError, KeyError, TypeError):
        logger.warning("no detections: %s can't be read or has no DATASETS.TEST", config_yaml)
        return []
    if not names:
        logger.warning("no detections: DATASETS.TEST is empty in %s", config_yaml)
    return names


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
