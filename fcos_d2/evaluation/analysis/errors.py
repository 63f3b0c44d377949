"""AP50 lost to each type of error: TIDE (Bolya et al., ECCV 2020)."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from ...data.boxes import SIZES, size_of_area
from ..average_precision import coco_ap, precision_recall
from .matching import image_pairs, match_detections, tabulate

ERROR_TYPES = ("classification", "localisation", "both", "duplicate", "background", "missed")


class ErrorBreakdown(NamedTuple):
    """The errors of a set of detections.

    Attributes:
        AP50: as in COCO's table, in percent; nan without objects.
        dap: one row for each of :data:`ERROR_TYPES`, "false positives" and "false negatives";
            column ``dAP``: points that AP50 gains if only errors of that type are fixed. They do
            not add up to 100, since one error can hide another.
        counts: errors per class: of the object for "missed", else of the detection.
        by_size: errors by the size of the object, or of the detection for "background".
    """

    AP50: float
    dap: pd.DataFrame
    counts: pd.DataFrame
    by_size: pd.DataFrame


def error_breakdown(
    records: Sequence[dict],
    predictions: Sequence[dict],
    class_names: Sequence[str],
    *,
    foreground_iou: float = 0.5,
    background_iou: float = 0.1,
) -> ErrorBreakdown:
    """Classify errors into six types and measure the AP50 lost to each (TIDE, section 2).

    A wrong detection has the first type that applies, with f and b the two IoU thresholds:

    - localisation: its largest IoU with an object of its class is in [b, f);
    - classification: its IoU with an object of another class is at least f;
    - duplicate: its IoU with an object of its class, matched by a better detection, is at least f;
    - background: its IoU with every object is below b;
    - both: all others, whose class and box are wrong.

    Missed objects are those that no detection matches, and no error of the first two types is
    about. To fix an error, a wrong class or box is corrected, or removed if its object is matched
    already or by a better corrected detection; duplicate, background and both are removed; missed
    objects are subtracted from the number of objects (a class without other objects keeps its
    AP). Fixing false positives removes all of them; fixing false negatives keeps only matched
    objects.

    Detections that match ignored objects (difficult, crowd) are not errors; ignored objects play
    no other role.

    Args:
        records, predictions, class_names: see :func:`match_detections`.
        foreground_iou: f; AP50 is the AP at this IoU.
        background_iou: b.

    Raises:
        ValueError: not 0 < background_iou < foreground_iou <= 1.
    """
    if not 0 < background_iou < foreground_iou <= 1:
        raise ValueError(
            f"background_iou {background_iou} and foreground_iou {foreground_iou} are not "
            "0 < background < foreground <= 1"
        )
    detections = match_detections(records, predictions, class_names, iou_thresh=foreground_iou)
    _, objects = tabulate(records, predictions, class_names)
    detections, objects = _find_errors(detections, objects, foreground_iou, background_iou)
    base = _fixed_ap(detections, objects, "")
    kinds = [*ERROR_TYPES, "false positives", "false negatives"]
    gains = [_fixed_ap(detections, objects, kind) - base for kind in kinds]
    dap = pd.DataFrame({"dAP": gains}, index=pd.Index(kinds, name="error"))
    counts = _count(detections, objects, "category_id", range(len(class_names)))
    target = detections["target"].to_numpy()
    sizes = size_of_area(detections["area"])
    sizes[target >= 0] = objects["size"].to_numpy()[target[target >= 0]]
    by_size = _count(detections.assign(size=sizes), objects, "size", SIZES).rename_axis("size")
    return ErrorBreakdown(base, dap, counts.set_axis(pd.Index(class_names, name="class")), by_size)


def _find_errors(
    detections: pd.DataFrame, objects: pd.DataFrame, foreground: float, background: float
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Add ``error`` ("" for none) and ``target`` (row of its object), ``missed`` and ``taken``."""
    wrong = (detections["outcome"] == "fp").to_numpy()
    error = np.where(wrong, "background", "").astype(object)
    target = np.full(len(detections), -1)
    ignored, index = objects["ignored"].to_numpy(), objects["index"].to_numpy()
    # Detections beyond the best 100 do not count, so they match nothing.
    truth = detections["truth"].where(detections["outcome"] == "tp", -1).to_numpy()
    taken = np.zeros(len(objects), dtype=bool)
    for pairs in image_pairs(detections, objects):
        real = ~ignored[pairs.objects]
        rows, columns = pairs.detections, pairs.objects[real]
        taken[pairs.objects[np.isin(index[pairs.objects], truth[rows])]] = True
        if not real.any():
            continue
        iou, same = pairs.iou[:, real], pairs.same_class[:, real]
        names, best = _classify(iou, same, foreground, background)
        chosen = wrong[rows]
        error[rows[chosen]] = names[chosen]
        meets = chosen & (names != "background")
        target[rows[meets]] = columns[best[meets]]
    missed = ~ignored & ~taken
    missed[target[np.isin(error, ("classification", "localisation"))]] = False
    objects = objects.assign(missed=missed, taken=taken)
    return detections.assign(error=error, target=target), objects


def _classify(
    iou: np.ndarray, same: np.ndarray, foreground: float, background: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the error type and the object of each detection of an image, as if it were wrong."""
    own, other = np.where(same, iou, 0), np.where(same, 0, iou)
    near = own.max(1) >= foreground
    names, best = np.full(len(iou), "both", dtype=object), iou.argmax(1)
    for name, holds, measure in (  # the last that holds wins
        ("background", iou.max(1) < background, iou),
        ("duplicate", near, own),
        ("classification", other.max(1) >= foreground, other),
        ("localisation", (own.max(1) >= background) & ~near, own),
    ):
        names[holds], best[holds] = name, measure[holds].argmax(1)
    return names, best


def _fixed_ap(detections: pd.DataFrame, objects: pd.DataFrame, kind: str) -> float:
    """Mean AP in percent with one type of error fixed ("" for none); nan without objects."""
    right = (detections["outcome"] == "tp").to_numpy()
    keep = (detections["outcome"] != "ignored").to_numpy()
    category = detections["category_id"].to_numpy().copy()
    real_class = objects["category_id"].to_numpy()
    real = counted = ~objects["ignored"].to_numpy()
    chosen = (detections["error"] == kind).to_numpy() & keep & ~right
    if kind in ("classification", "localisation"):
        target = detections["target"].to_numpy()
        # The best detection per object is corrected, the others are removed.
        rows = np.flatnonzero(chosen)
        rows = rows[~objects["taken"].to_numpy()[target[rows]]]
        rows = rows[np.unique(target[rows], return_index=True)[1]]
        right = right.copy()
        right[rows] = True
        category[rows] = real_class[target[rows]]
        keep = keep & (~chosen | right)
    elif kind == "missed":
        counted = counted & ~objects["missed"].to_numpy()
    elif kind == "false positives":
        keep = keep & right
    elif kind == "false negatives":
        counted = counted & objects["taken"].to_numpy()
    else:
        keep = keep & ~chosen
    values = []
    for k in pd.unique(real_class[real]):
        hits = right[keep & (category == k)]
        # A class whose objects are all subtracted has no detection that is right.
        positives = int(np.count_nonzero(real_class[counted] == k))
        values.append(coco_ap(*precision_recall(hits, ~hits, positives)))
    return 100 * float(np.mean(values)) if values else float("nan")


def _count(
    detections: pd.DataFrame, objects: pd.DataFrame, column: str, values: Sequence
) -> pd.DataFrame:
    """Errors (columns) by the values of a column (rows)."""
    groups = {x: detections.loc[detections["error"] == x, column] for x in ERROR_TYPES[:-1]}
    groups["missed"] = objects.loc[objects["missed"], column]
    counts = {x: rows.value_counts().reindex(values, fill_value=0) for x, rows in groups.items()}
    return pd.DataFrame(counts).astype(int)
