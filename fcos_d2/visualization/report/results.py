"""The sections about one test set."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from ...evaluation import analysis
from ...evaluation.analysis import PrecisionRecall
from ...evaluation.coco import COCO_ROWS
from . import figures
from .blocks import Beside, Block, Figures, Section, Shots, Text, Tiles, build_section, explain
from .gather import BEST_FILE, Best, Results
from .pictures import choose_images, draw_pairs
from .tables import table

_LARGEST = 10  # confusions in the table
_PHONE = 480  # CSS pixels; a wider picture can't be read when it is scaled down to a phone
_CLASS_COLUMNS = {
    "name": "class",
    "AP": "AP",
    "AP50": "AP50",
    "AP50_11point": "VOC 11-point",
    "AP50_area": "VOC area",
    "num_ground_truth": "objects",
    "num_ignored": "ignored",
    "num_predictions": "predictions",
}
_TILES = (
    ("AP", "bbox", "AP"),
    ("AP50", "bbox", "AP50"),
    ("AP75", "bbox", "AP75"),
    ("VOC AP50, area", "voc", "AP50_area"),
    ("VOC AP50, 11-point", "voc", "AP50_11point"),
)


def result_tiles(results: Results, best: Best | None = None) -> Tiles:
    """The main numbers of a test set, what was evaluated, and whether another one was better.

    Raises:
        ValueError: it has no evaluation.
    """
    if results.proposals is not None:
        values = [(name, _percent(value)) for name, value in results.proposals.items()]
        return Tiles(results.dataset, values, ["Average recall of region proposals, %."])
    evaluation = results.evaluation
    if evaluation is None:
        raise ValueError(results.problems["evaluation"])
    values = [(label, _percent(evaluation[table].get(key))) for label, table, key in _TILES]
    note = "{num_images} images, {num_ground_truth} objects and {num_ignored} ignored ones, "
    note = (note + "{num_predictions} predictions; numbers in percent.").format(**evaluation)
    unseen = evaluation["num_images"] - evaluation["num_processed_images"]
    if unseen:
        note += f" {unseen} images were not processed and count as without predictions."
    model = evaluation.get("model") or {}  # older versions don't tell
    notes = [note, _describe_model(model), _describe_best(model.get("iteration"), best)]
    return Tiles(results.dataset, values, [text for text in notes if text])


def _describe_model(model: Mapping[str, Any]) -> str:
    """What was evaluated; nothing where that is not known.

    Args:
        model: as in ``evaluation.json``.
    """
    if not model:
        return ""
    parts = [
        model["weights"] or "the model in training",
        None if model["iteration"] is None else f"iteration {model['iteration']}",
        "averaged weights (EMA)" if model["ema"] else None,
        "test-time augmentation" if model["tta"] else None,
        None if model["optimize"] == "none" else f"TEST.OPTIMIZE {model['optimize']}",
        "TEST.COMPILE" if model.get("compile") else None,  # of older versions
    ]
    return f"Evaluated: {', '.join(filter(None, parts))}."


def _describe_best(iteration: int | None, best: Best | None) -> str:
    """Which evaluation was the best, where the results are not its own.

    Args:
        iteration: of the results; None if it is not known.
        best: of the training; None if it is not known.
    """
    if best is None or iteration == best.iteration:
        return ""
    start = "The" if iteration is None else f"Results of iteration {iteration}; the"
    measured = f"{best.metric} {_percent(best.value)} at iteration {best.iteration}"
    return f"{start} best, {measured}, is {BEST_FILE}."


def result_sections(results: Results) -> Section:
    """All sections of a test set in one group."""
    title = f"Results on {results.dataset}"
    if results.proposals is not None:
        return Section(results.slug, title, missing=results.problems["evaluation"])
    parts = [build_section(f"{results.slug}-ap", "AP", partial(_tables, results))]
    try:
        curves = analysis.precision_recall(*_needed(results))
        score_thresh = _operating_threshold(results)
    except Exception as error:
        missing = f"No analysis: {explain(error, title)}"
        return Section(results.slug, title, missing=missing, parts=parts)
    builders = (
        ("pr", "Precision and recall", partial(_precision_recall, curves=curves)),
        ("confusion", "Confusion of classes", partial(_confusion, score_thresh=score_thresh)),
        ("errors", "Where the AP is lost", _errors),
        ("calibration", "Score: calibration and thresholds", partial(_calibration, curves=curves)),
        ("images", "Best, typical and worst images", partial(_images, score_thresh=score_thresh)),
    )
    for anchor, name, build in builders:
        parts.append(build_section(f"{results.slug}-{anchor}", name, partial(build, results)))
    return Section(results.slug, title, parts=parts)


def _needed(results: Results) -> tuple[list[dict], list[dict], list[str]]:
    """What all analysis functions take first.

    Raises:
        ValueError: it is not there.
    """
    for what in ("evaluation", "predictions", "records"):
        if what in results.problems:
            raise ValueError(results.problems[what])
    return results.records, results.predictions, results.class_names


def _operating_threshold(results: Results) -> float:
    """The score threshold of best F1 over all classes together, rounded down to hundredths.

    The least score is taken where there is no prediction or no object.
    """
    matches = analysis.match_detections(*_needed(results))
    objects = int((~analysis.ground_truth(results.records, results.class_names)["ignored"]).sum())
    matches = matches[matches["outcome"] != "ignored"]
    right = (matches["outcome"] == "tp").to_numpy().cumsum()
    if not objects or not len(matches) or not right[-1]:
        return 0.0
    f1 = 2 * right / (np.arange(1, len(right) + 1) + objects)
    return float(np.floor(100 * matches["score"].to_numpy()[f1.argmax()]) / 100)


def _tables(results: Results) -> list[Block]:
    evaluation = results.evaluation
    if evaluation is None:
        raise ValueError(results.problems["evaluation"])
    rows = [(*row, evaluation["bbox"].get(row[0])) for row in COCO_ROWS]
    coco = pd.DataFrame(rows, columns=["metric", "IoU", "area", "maxDets", "%"])
    classes = pd.DataFrame(evaluation["per_class"])[list(_CLASS_COLUMNS)]
    classes = classes.rename(columns=_CLASS_COLUMNS).set_index("class")
    caption = "Each class, %. VOC: AP at IoU 0.5, by 11 points (2007) and by area (2010)."
    coco_caption = "COCO's table, %; difficult objects and crowds are ignored."
    coco = table(coco.set_index("metric"), coco_caption)
    return [Beside([coco, table(classes, caption, bars=("AP",))])]


def _precision_recall(results: Results, curves: Sequence[PrecisionRecall]) -> list[Block]:
    small = []
    for curve, row in zip(curves, results.evaluation["per_class"], strict=True):
        title = f"{curve.class_name}: {_percent(row['AP50_area'])}"
        small.append((title, figures.precision_recall(curve)))
    return [
        Text(
            "At IoU 0.5: the highest precision at each recall. Over each class's curve stands its "
            "VOC AP50 (area); the dot is at the threshold of best F1."
        ),
        Figures([("All classes", figures.mean_precision_recall(curves))]),
        Figures(small, "small"),
    ]


def _confusion(results: Results, score_thresh: float) -> list[Block]:
    names = results.class_names
    matrix = analysis.confusion_matrix(*_needed(results), score_thresh=score_thresh)
    missed, background = int(matrix[:-1, -1].sum()), int(matrix[-1, :-1].sum())
    text = (
        f"Predictions of a score of at least {score_thresh:.2f}, the threshold of best F1 over all "
        f"classes together, matched to objects at IoU 0.5 whatever their class. {missed} of "
        f"{int(matrix[:-1].sum())} objects are missed, {background} of "
        f"{int(matrix[:, :-1].sum())} predictions are on background."
    )
    picture = figures.confusion(matrix, names)
    layout = "two" if picture.width <= _PHONE else "wide"
    blocks: list[Block] = [Text(text), Figures([("Confusion matrix", picture)], layout)]
    largest = _largest_confusions(matrix[:-1, :-1], matrix[:-1].sum(1), names)
    if largest.empty:
        return [*blocks, Text("No object is taken for another class.")]
    caption = "The largest confusions of two classes."
    return [*blocks, Beside([table(largest, caption)])]


def _largest_confusions(
    matrix: np.ndarray, totals: np.ndarray, names: Sequence[str]
) -> pd.DataFrame:
    """Pairs of classes by how many objects of the one (K, K) are taken for the other."""
    off = matrix * (1 - np.eye(len(matrix), dtype=matrix.dtype))
    order = np.argsort(-off, axis=None, kind="stable")[:_LARGEST]
    pairs = [divmod(int(i), len(off)) for i in order]
    rows = [
        (names[i], names[j], int(off[i, j]), 100 * off[i, j] / totals[i])
        for i, j in pairs
        if off[i, j]
    ]
    columns = ["truth", "predicted as", "objects", "% of the class's objects"]
    return pd.DataFrame(rows, columns=columns).set_index("truth")


def _errors(results: Results) -> list[Block]:
    breakdown = analysis.error_breakdown(*_needed(results))
    if math.isnan(breakdown.AP50):
        raise ValueError("the test set has no objects that count")
    text = (
        f"AP50 is {breakdown.AP50:.1f}. Each bar is what an oracle that mends this kind of error "
        "alone would add (TIDE, Bolya et al. 2020): a wrong class; a box of IoU 0.1 to 0.5; both; "
        "a second detection of an object; background taken for an object; an object that nothing "
        "found. The last two mend all that is wrong, or all that is not found."
    )
    counts, sizes = breakdown.counts.rename_axis("class"), breakdown.by_size.rename_axis("size")
    return [
        Text(text),
        Beside(
            [
                ("AP50 lost", figures.errors(breakdown.dap)),
                table(
                    sizes, "Errors of all predictions by size: area up to 32², up to 96², larger."
                ),
                table(counts, "Errors of all predictions by class."),
            ]
        ),
    ]


def _calibration(results: Results, curves: Sequence[PrecisionRecall]) -> list[Block]:
    calibration = analysis.calibration(*_needed(results))
    bins = calibration.table.copy()
    bins.index = [f"{low:.1f}–{high:.1f}" for low, high in bins[["low", "high"]].to_numpy()]
    bins = bins.rename_axis("score")[["count", "mean_score", "precision"]]
    bins = bins.rename(columns={"count": "predictions", "mean_score": "mean score"})
    rows = []
    for curve in curves:
        at = figures.at_threshold(curve)
        rows.append((curve.class_name, curve.best_threshold, curve.best_f1, *at))
    columns = ["class", "threshold", "F1", "precision", "recall"]
    best = pd.DataFrame(rows, columns=columns).set_index("class")
    error = f"The expected calibration error is {calibration.ece:.3f}."
    text = (
        "A calibrated score is the share of the predictions of that score that are right (IoU 0.5, "
        "right class). "
    ) + ("There are no predictions that count." if math.isnan(calibration.ece) else error)
    digits = dict.fromkeys(("mean score", "precision", "recall", "threshold", "F1"), "{:.2f}")
    return [
        Text(text),
        Beside(
            [
                ("Reliability", figures.reliability(calibration)),
                table(bins, "Predictions by score.", digits),
                table(best, "The score threshold of best F1 of each class, IoU 0.5.", digits),
            ]
        ),
    ]


def _images(results: Results, score_thresh: float) -> list[Block]:
    inputs = _needed(results)
    ranking = analysis.rank_images(*inputs, score_thresh=score_thresh)
    text = (
        "Ground truth on the left, predictions on the right; images ranked by their F1 at a score "
        f"of at least {score_thresh:.2f} and IoU 0.5. Dashed: ignored. A click opens a larger view."
    )
    blocks: list[Block] = [Text(text)]
    for kind, image_ids in choose_images(ranking).items():
        shots = draw_pairs(image_ids, *inputs, ranking, score_thresh=score_thresh)
        if shots:
            blocks.append(Shots(kind, shots))
    if len(blocks) == 1:
        raise ValueError("none of the chosen images could be read")
    return blocks


def _percent(value: float | None) -> str:
    return "–" if value is None or np.isnan(value) else f"{value:.1f}"
