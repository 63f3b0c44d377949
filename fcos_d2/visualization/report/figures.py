"""Plots (SVG) and photographs (JPEG) of the report, as ``data:`` URLs.

SVGs are not inline, because identifiers inside the SVGs would clash within one document.
"""

import base64
import io
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from ...evaluation.analysis import Calibration, PrecisionRecall
from ...evaluation.average_precision import precision_at
from ..curves import (
    BLACK,
    BLUE,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    draw_learning_rate,
    draw_losses,
    draw_matching,
    draw_metrics,
)

ERROR_COLORS = {
    "classification": PURPLE,
    "localisation": SKY,
    "both": BLACK,
    "duplicate": ORANGE,
    "background": VERMILLION,
    "missed": BLUE,
}

PHOTO_SIDE = 480  # pixels of the longer side
_RECALLS = np.linspace(0, 1, 101)
_MAX_ANNOTATED = 24  # classes; cells of larger matrices have no room for numbers
_STYLE = {
    "font.size": 9,
    "axes.edgecolor": "#b8c1c8",
    "axes.labelcolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#e4e8eb",
    "xtick.color": GREY,
    "ytick.color": GREY,
    "text.color": BLACK,
    "path.simplify_threshold": 0.5,
    "svg.fonttype": "path",  # independent of the fonts of the reader
    "svg.hashsalt": "fcos_d2",  # reproducible files
}


class Picture(NamedTuple):
    """An image of the page."""

    source: str  # data: URL
    alt: str
    width: int  # CSS pixels
    height: int


@matplotlib.rc_context(_STYLE)
def training_curves(history: Sequence[dict]) -> list[tuple[str, Picture]]:
    """Draw losses, AP, learning rate and matching over iterations, each with its title.

    Args:
        history: lines of metrics.json, at least one with ``total_loss``.
    """
    panels = (
        ("Losses", draw_losses),
        ("AP over iterations", draw_metrics),
        ("Learning rate", draw_learning_rate),
        ("Matching", draw_matching),
    )
    last = history[-1]["iteration"]
    pictures = []
    for title, draw in panels:
        figure, ax = _figure(4.8, 3.2)
        draw(ax, history)
        ax.set_title("", loc="left")  # the page has it as a caption
        ax.set_xlabel("iteration")
        pictures.append((title, _picture(figure, f"{title}, up to iteration {last}.")))
    return pictures


@matplotlib.rc_context(_STYLE)
def mean_precision_recall(curves: Sequence[PrecisionRecall]) -> Picture:
    """Draw the curves of the classes with objects (grey) and their mean."""
    measured = [curve for curve in curves if curve.num_ground_truth]
    levels = np.array([precision_at(x.recall, x.precision, _RECALLS) for x in measured])
    levels = levels.reshape(-1, 101)
    figure, ax = _figure(4.8, 3.4)
    ax.plot(_RECALLS, levels.T, color="#9aa5ae", linewidth=0.7, alpha=0.7)
    if len(levels):
        ax.plot(_RECALLS, levels.mean(0), color=BLUE, linewidth=2.5, label="mean of classes")
        ax.legend(frameon=False, loc="lower left")
    _unit_axes(ax, "recall", "precision")
    alt = f"Precision over recall of {len(measured)} classes and their mean."
    return _picture(figure, alt)


def precision_recall(curve: PrecisionRecall) -> Picture:
    """Draw the curve of one class, small, with a dot at the best F1."""
    with matplotlib.rc_context({**_STYLE, "font.size": 7.5}):
        # Automatic layout takes most of the time of a figure, and there can be 80.
        figure = Figure(figsize=(1.9, 1.5), facecolor="white")
        ax = figure.add_axes((0.13, 0.13, 0.83, 0.84))
        if curve.num_ground_truth:
            precision = precision_at(curve.recall, curve.precision, _RECALLS)
            ax.fill_between(_RECALLS, precision, color=BLUE, alpha=0.15, linewidth=0)
            ax.plot(_RECALLS, precision, color=BLUE, linewidth=1.4)
            ax.plot(curve.best_recall, curve.best_precision, "o", color=VERMILLION, markersize=4)
            words = (
                f"best F1 {curve.best_f1:.2f} at precision {curve.best_precision:.2f} and recall "
                f"{curve.best_recall:.2f}"
            )
            words = "no object found" if np.isnan(curve.best_recall) else words
        else:
            words = "no objects"
            ax.text(0.5, 0.5, words, ha="center", va="center", color=GREY)
        _unit_axes(ax)
        ax.set_xticks([0, 0.5, 1], ["0", ".5", "1"])
        ax.set_yticks([0, 0.5, 1], ["0", ".5", "1"])
        return _picture(figure, f"Precision over recall of {curve.class_name}: {words}.")


def confusion(matrix: np.ndarray, class_names: Sequence[str]) -> Picture:
    """Draw a confusion matrix as a heat map, each row in percent of its sum.

    Args:
        matrix: (K+1, K+1) counts, rows truth and columns prediction; background is the last row,
            "missed" the last column.
        class_names: names of the K classes.
    """
    shares = 100 * matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    annotated = len(class_names) <= _MAX_ANNOTATED
    side = len(matrix) * (0.32 if annotated else 0.098)
    with matplotlib.rc_context({**_STYLE, "font.size": 8 if annotated else 5.5}):
        figure, ax = _figure(max(side + 1.7, 4.4), max(side + 1.1, 3.4))
        image = ax.imshow(shares, cmap="Blues", vmin=0, vmax=100, interpolation="nearest")
        ticks = range(len(matrix))
        ax.set_xticks(ticks, [*map(_short, class_names), "missed"], rotation=90)
        ax.set_yticks(ticks, [*map(_short, class_names), "background"])
        ax.set_xlabel("predicted as")
        ax.set_ylabel("truth")
        ax.spines[:].set_visible(True)
        ax.tick_params(length=0)
        for edge in (ax.axhline, ax.axvline):
            edge(len(matrix) - 1.5, color=BLACK, linewidth=0.8)
        if annotated:
            _annotate(ax, matrix, shares)
        bar = figure.colorbar(image, ax=ax, shrink=0.6, pad=0.02, aspect=30)
        bar.set_label("% of the row")
        bar.outline.set_visible(False)
        alt = f"Confusion matrix of {len(class_names)} classes and background; see the table."
        return _picture(figure, alt)


def _annotate(ax: Axes, matrix: np.ndarray, shares: np.ndarray) -> None:
    for row, column in np.argwhere(matrix > 0):
        share = shares[row, column]
        text = f"{share:.0f}" if share >= 0.5 else "·"
        color = "white" if share > 50 else "black"
        ax.text(column, row, text, ha="center", va="center", fontsize=6.5, color=color)


@matplotlib.rc_context(_STYLE)
def errors(dap: pd.DataFrame) -> Picture:
    """Draw the AP50 gained by fixing each type of error, as bars.

    Args:
        dap: column ``dAP`` in percentage points, one row per type of error.
    """
    values = dap["dAP"].to_numpy(dtype=float)
    colors = [ERROR_COLORS.get(name, "#9aa5ae") for name in dap.index]
    figure, ax = _figure(4.8, 0.34 * len(values) + 0.6)
    bars = ax.barh(range(len(values)), values, color=colors, height=0.7)
    ax.bar_label(bars, [f"{value:.1f}" for value in values], padding=3, color=BLACK)
    ax.set_yticks(range(len(values)), dap.index)
    ax.invert_yaxis()
    ax.set_xlabel("AP50, percentage points")
    ax.set_xlim(0, 1.15 * max(float(np.nanmax(values)), 1.0))
    ax.grid(axis="x")
    ax.tick_params(axis="y", length=0, labelcolor=BLACK)
    words = ", ".join(f"{n} {v:.1f}" for n, v in zip(dap.index, values, strict=True))
    return _picture(figure, f"AP50 lost to each type of error, percentage points: {words}.")


@matplotlib.rc_context(_STYLE)
def reliability(calibration: Calibration) -> Picture:
    """Draw precision over score, and the number of predictions per bin (logarithmic)."""
    table = calibration.table
    centers = (table["low"] + table["high"]).to_numpy(dtype=float) / 2
    widths = (table["high"] - table["low"]).to_numpy(dtype=float)
    figure = Figure(figsize=(4.8, 4.2), layout="constrained", facecolor="white")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle="--", label="calibrated")
    upper.bar(centers, table["precision"], 0.92 * widths, color=SKY, label="precision")
    mean = (table["mean_score"], table["precision"])
    upper.plot(*mean, "o", color=VERMILLION, markersize=4, label="at mean score of bin")
    upper.legend(frameon=False, loc="upper left", fontsize=8)
    _unit_axes(upper, "", "precision")
    lower.bar(centers, table["count"], 0.92 * widths, color=GREY)
    lower.set_yscale("symlog", linthresh=1)
    lower.set_ylim(bottom=0)
    lower.set_xlabel("score")
    lower.set_ylabel("predictions")
    lower.grid(axis="y")
    alt = f"Reliability diagram; expected calibration error {calibration.ece:.3f}."
    return _picture(figure, alt)


@matplotlib.rc_context(_STYLE)
def positives_per_object(objects: pd.DataFrame) -> Picture:
    """Draw the distribution of positive locations per object, stacked by size.

    Args:
        objects: one row per object, with ``size`` and ``positives``.
    """
    largest = max(int(objects["positives"].max()) if len(objects) else 0, 1)
    edges = [0, 1, *(2**k for k in range(1, largest.bit_length() + 1))]
    labels = [str(a) if b == a + 1 else f"{a}–{b - 1}" for a, b in pairwise(edges)]
    figure, ax = _figure(4.8, 2.6)
    bottom = np.zeros(len(labels))
    sizes = (("small", VERMILLION), ("medium", ORANGE), ("large", BLUE))
    for size, color in sizes:
        positives = objects.loc[objects["size"] == size, "positives"]
        counts = np.histogram(positives, bins=edges[:-1] + [np.inf])[0]
        ax.bar(labels, counts, bottom=bottom, color=color, width=0.8, label=size)
        bottom += counts
    ax.set_xlabel("positive locations per object")
    ax.set_ylabel("objects")
    ax.grid(axis="y")
    ax.legend(frameon=False)
    none = int((objects["positives"] == 0).sum())
    alt = f"Objects by their number of positive locations; {none} of {len(objects)} have none."
    return _picture(figure, alt)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    return figure, figure.subplots()


def _unit_axes(ax: Axes, x: str = "", y: str = "") -> None:
    ax.set_xlim(0, 1)
    ax.set_ylim(0, 1.02)
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.grid()


def _short(name: str) -> str:
    name = name if len(name) <= 18 else name[:17] + "…"
    return name.replace("$", r"\$")  # matplotlib reads text between $ as mathematics


def _picture(figure: Figure, alt: str) -> Picture:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    width, height = figure.get_size_inches() * 96
    return Picture(_data_url("svg+xml", buffer), alt, round(width), round(height))


def jpeg(image: np.ndarray, alt: str, side: int = PHOTO_SIDE) -> Picture:
    """Encode an RGB image (H, W, 3) uint8, scaled down if a side is longer than ``side``."""
    picture = Image.fromarray(image)
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=80, optimize=True)
    return Picture(_data_url("jpeg", buffer), alt, *picture.size)


def _data_url(kind: str, buffer: io.BytesIO) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
