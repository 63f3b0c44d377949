"""Content of the report's sections: each function computes the values of its template macro."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from ...data.inspection.assignment import assignment_table, summarize_assignment
from ...evaluation import analysis
from ...evaluation.analysis import PrecisionRecall
from ...evaluation.tables import class_frame, coco_frame
from . import figures
from .gather import (
    BEST_FILE,
    Best,
    Evaluation,
    Run,
    changed_settings,
    describe_checkpoints,
    explain,
    load_source,
)
from .photos import choose_images, choose_records, draw_locations, draw_pairs

_MAX_CONFUSIONS = 10  # rows of the table
_MAX_WIDTH = 480  # CSS pixels; wider pictures are unreadable when scaled down to a phone
_MAX_ASSIGNED = 5000  # images; COCO's 118 000 take many minutes for the same statistics
_NUM_OVERLAYS = 6
_MAIN_METRICS = (
    ("AP", "bbox", "AP"),
    ("AP50", "bbox", "AP50"),
    ("AP75", "bbox", "AP75"),
    ("VOC AP50, area", "voc", "AP50_area"),
    ("VOC AP50, 11-point", "voc", "AP50_11point"),
)
_ASSIGNMENT_COLUMNS = {
    "coverage": "with a location, %",
    "positives_mean": "locations, mean",
    "positives_median": "median",
}


def summary(run: Run) -> dict[str, Any]:
    """Main metrics of each test set, the evaluated model, and the best evaluation."""
    if not run.evaluations:
        raise ValueError("There is no evaluation, and the config has no DATASETS.TEST.")
    summaries = []
    for evaluation in run.evaluations:
        try:
            content = _main_metrics(evaluation, run.best)
        except Exception as error:
            content = {"missing": explain(error)}
        summaries.append({"dataset": evaluation.dataset, **content})
    return {"summaries": summaries}


def _main_metrics(evaluation: Evaluation, best: Best | None) -> dict[str, Any]:
    if evaluation.proposal_recall is not None:
        notes = ["Average recall of region proposals, %."]
        return {"metrics": evaluation.proposal_recall, "notes": notes}
    tables = _tables_of(evaluation)
    note = (
        "{num_images} images, {num_ground_truth} objects, {num_ignored} ignored objects, "
        "{num_predictions} predictions; metrics in percent."
    ).format(**tables)
    unseen = tables["num_images"] - tables["num_processed_images"]
    if unseen:
        note += f" {unseen} images were not processed and count as images without predictions."
    model = tables.get("model") or {}  # earlier versions do not write it
    notes = [note, _describe_model(model), _describe_best(model.get("iteration"), best)]
    return {
        "metrics": {label: tables[table].get(key) for label, table, key in _MAIN_METRICS},
        "notes": [text for text in notes if text],
    }


def _tables_of(evaluation: Evaluation) -> dict[str, Any]:
    if evaluation.tables is None:
        raise ValueError(evaluation.problems["tables"])
    return evaluation.tables


def _describe_model(model: Mapping[str, Any]) -> str:
    if not model:
        return ""
    parts = [
        model["weights"] or "model in training",
        None if model["iteration"] is None else f"iteration {model['iteration']}",
        "averaged weights (EMA)" if model["ema"] else None,
        "test-time augmentation" if model["tta"] else None,
        None if model["optimize"] == "none" else f"TEST.OPTIMIZE {model['optimize']}",
        "compiled" if model.get("compile") else None,  # of earlier versions
    ]
    return f"Evaluated: {', '.join(filter(None, parts))}."


def _describe_best(iteration: int | None, best: Best | None) -> str:
    """Name the best evaluation, unless it is that of ``iteration`` (None: unknown)."""
    if best is None or iteration == best.iteration:
        return ""
    start = "The" if iteration is None else f"Results of iteration {iteration}; the"
    return (
        f"{start} best evaluation, {best.metric} {best.value:.1f} at iteration {best.iteration}, "
        f"is in {BEST_FILE}."
    )


def training(run: Run) -> dict[str, Any]:
    """Training curves."""
    if "history" in run.problems:
        raise ValueError(run.problems["history"])
    return {
        "curves": figures.training_curves(run.history),
        "eval_only": bool(run.commands) and "--eval-only" in run.commands[-1]["command"].split(),
    }


def tables(evaluation: Evaluation) -> dict[str, Any]:
    """COCO's table and the table of classes."""
    content = _tables_of(evaluation)
    return {"coco": coco_frame(content), "classes": class_frame(content)}


def analysis_inputs(evaluation: Evaluation) -> tuple[list[dict], list[dict], list[str]]:
    """Return records, predictions and class names, the first arguments of every analysis.

    Raises:
        ValueError: an input is missing; the message has the reason.
    """
    for field in ("tables", "predictions", "records"):
        if field in evaluation.problems:
            raise ValueError(evaluation.problems[field])
    return evaluation.records or [], evaluation.predictions or [], evaluation.class_names


def best_threshold(evaluation: Evaluation) -> float:
    """Return the score threshold of the best F1 over all classes, rounded down to hundredths.

    It is 0 without predictions or objects.
    """
    inputs = analysis_inputs(evaluation)
    matches = analysis.match_detections(*inputs)
    objects = int((~analysis.ground_truth(inputs[0], inputs[2])["ignored"]).sum())
    matches = matches[matches["outcome"] != "ignored"]
    right = (matches["outcome"] == "tp").to_numpy().cumsum()
    if not objects or not len(matches) or not right[-1]:
        return 0.0
    f1 = 2 * right / (np.arange(1, len(right) + 1) + objects)
    return float(np.floor(100 * matches["score"].to_numpy()[f1.argmax()]) / 100)


def precision_recall(evaluation: Evaluation, curves: Sequence[PrecisionRecall]) -> dict[str, Any]:
    """Precision-recall curves."""
    rows = _tables_of(evaluation)["per_class"]
    return {
        "mean": figures.mean_precision_recall(curves),
        "curves": [
            (curve.class_name, row["AP50_area"], figures.precision_recall(curve))
            for curve, row in zip(curves, rows, strict=True)
        ],
    }


def confusion(evaluation: Evaluation, score_thresh: float) -> dict[str, Any]:
    """Confusion matrix."""
    names = evaluation.class_names
    matrix = analysis.confusion_matrix(*analysis_inputs(evaluation), score_thresh=score_thresh)
    picture = figures.confusion(matrix, names)
    return {
        "score_thresh": score_thresh,
        "missed": matrix[:-1, -1].sum(),
        "objects": matrix[:-1].sum(),
        "background": matrix[-1, :-1].sum(),
        "predictions": matrix[:, :-1].sum(),
        "picture": picture,
        "wide": picture.width > _MAX_WIDTH,
        "largest": largest_confusions(matrix, names),
    }


def largest_confusions(matrix: np.ndarray, names: Sequence[str]) -> pd.DataFrame:
    """Return the pairs of classes with the most confused objects.

    Args:
        matrix: (K + 1, K + 1) counts, as from ``confusion_matrix``.
        names: of the K classes.
    """
    totals = matrix.sum(1)
    rows = [
        (names[i], names[j], int(matrix[i, j]), 100 * matrix[i, j] / totals[i])
        for i, j in np.argwhere(matrix[:-1, :-1])
        if i != j
    ]
    rows.sort(key=lambda row: -row[2])
    columns = ["truth", "predicted as", "objects", "% of class"]
    return pd.DataFrame(rows[:_MAX_CONFUSIONS], columns=columns)


def errors(evaluation: Evaluation) -> dict[str, Any]:
    """AP50 lost to each type of error."""
    breakdown = analysis.error_breakdown(*analysis_inputs(evaluation))
    if math.isnan(breakdown.AP50):
        raise ValueError("The test set has no objects, or only ignored ones.")
    return {
        "ap50": breakdown.AP50,
        "picture": figures.errors(breakdown.dap),
        "sizes": breakdown.by_size.reset_index(),
        "classes": breakdown.counts.reset_index(),
    }


def calibration(evaluation: Evaluation, curves: Sequence[PrecisionRecall]) -> dict[str, Any]:
    """Reliability diagram and score thresholds."""
    result = analysis.calibration(*analysis_inputs(evaluation))
    bins = result.table
    bins.insert(0, "score", [f"{row.low:.1f}–{row.high:.1f}" for row in bins.itertuples()])
    bins = bins.drop(columns=["low", "high"])
    rows = [
        (x.class_name, x.best_threshold, x.best_f1, x.best_precision, x.best_recall) for x in curves
    ]
    columns = ["class", "threshold", "F1", "precision", "recall"]
    return {
        "ece": result.ece,
        "picture": figures.reliability(result),
        "bins": bins.rename(columns={"count": "predictions", "mean_score": "mean score"}),
        "thresholds": pd.DataFrame(rows, columns=columns),
    }


def images(evaluation: Evaluation, score_thresh: float) -> dict[str, Any]:
    """Photographs of the best, typical and worst images."""
    ranking = analysis.rank_images(*analysis_inputs(evaluation), score_thresh=score_thresh)
    groups = {
        title: draw_pairs(image_ids, evaluation, ranking, score_thresh=score_thresh)
        for title, image_ids in choose_images(ranking).items()
    }
    if not any(groups.values()):
        raise ValueError("None of the chosen images could be read.")
    return {"score_thresh": score_thresh, "groups": groups}


def assignment(run: Run) -> dict[str, Any]:
    """Statistics and overlays of positive locations."""
    cfg = run.cfg
    if cfg is None:
        raise ValueError(run.problems.get("config") or run.problems["cfg"])
    sources = [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]
    dataset, records, names = load_source(sources, cfg.DATASETS.SKIP_BAD_BOXES)
    num_images = len(records)
    if num_images > _MAX_ASSIGNED:
        records = choose_records(records, _MAX_ASSIGNED)
    table = assignment_table(records, cfg)
    frames = summarize_assignment(table, names)
    return {
        "dataset": dataset,
        "num_images": num_images,
        "num_assigned": len(records),
        "assignment": table,
        "picture": figures.positives_per_object(table.objects),
        "frames": {
            kind: frames[kind].rename(columns=_ASSIGNMENT_COLUMNS).reset_index()
            for kind in ("size", "level", "class")
        },
        "photos": draw_locations(records, table, names, cfg, count=_NUM_OVERLAYS),
    }


def provenance(run: Run) -> dict[str, Any]:
    """Commands, versions, settings and checkpoints."""
    commands = versions = None
    if run.commands:
        rows = [(_minute(x["environment"].get("date", "–")), x["command"]) for x in run.commands]
        commands = pd.DataFrame(rows, columns=["date (UTC)", "command"])
        environment = run.commands[-1]["environment"].items()
        rows = [(k, str(v)) for k, v in environment if k != "date" and v is not None]
        versions = pd.DataFrame(rows, columns=["name", "value"])
    return {
        "commands": commands,
        "versions": versions,
        "problems": run.problems,
        "config": run.config_text,
        "changed": changed_settings(run.settings) if run.settings else None,
        "checkpoints": pd.DataFrame(describe_checkpoints(run.folder)),
    }


def _minute(date: str) -> str:
    return date[:16].replace("T", " ")
