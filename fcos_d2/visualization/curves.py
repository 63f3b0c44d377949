"""Training curves from Detectron2's metrics.json."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..evaluation.results import read_metrics
from ..files import atomic_path

# Palette of Okabe and Ito, distinguishable for colour-blind readers.
BLACK, VERMILLION, BLUE, ORANGE = "#22303c", "#d55e00", "#0072b2", "#e69f00"
GREEN, PURPLE, SKY, BROWN = "#009e73", "#cc79a7", "#56b4e9", "#8d6b4f"
GREY = "#5f6b76"
_COLORS = (BLACK, VERMILLION, BLUE, ORANGE, GREEN, PURPLE, SKY, BROWN)
_METRICS = (("bbox/AP", "AP"), ("bbox/AP50", "AP50"), ("voc/AP50_area", "VOC AP50 (area)"))


def plot_training_curves(metrics_json: str | os.PathLike, output_png: str | os.PathLike) -> None:
    """Draw losses, learning rate, AP and matcher statistics over iterations.

    Losses are drawn as written (thin) and as a moving average over a twentieth of the points
    (thick). A panel without data says so.

    Args:
        metrics_json: JSON lines of Detectron2's ``JSONWriter``.
        output_png: the picture, written atomically.

    Raises:
        FileNotFoundError: ``metrics_json`` is missing.
        ValueError: it has no line of training.
    """
    history = read_metrics(metrics_json)
    check_history(history)
    figure = Figure(figsize=(13, 8), dpi=110, layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    axes = figure.subplots(2, 2, sharex=True)
    draw_losses(axes[0, 0], history)
    draw_metrics(axes[0, 1], history)
    draw_learning_rate(axes[1, 0], history)
    draw_matching(axes[1, 1], history)
    for ax in axes[1]:
        ax.set_xlabel("iteration")
    with atomic_path(output_png) as temporary:
        figure.savefig(temporary, format="png")


def check_history(history: Sequence[dict]) -> None:
    """Refuse lines of metrics.json without training."""
    if not any("total_loss" in line for line in history):
        raise ValueError(
            "metrics.json has no line of training (none with 'total_loss'): train for at least one "
            "log period (20 iterations) first"
        )


def smooth(values: np.ndarray) -> np.ndarray:
    """Compute the centred moving average over a twentieth of the points, without nan and inf.

    Args:
        values: (N,).

    Returns:
        (N,); the window is cut off at both ends.
    """
    window = 2 * (len(values) // 40) + 1
    finite = pd.Series(np.where(np.isfinite(values), values, np.nan))
    return finite.rolling(window, center=True, min_periods=1).mean().to_numpy()


def _series(history: Sequence[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Iterations and values of one key."""
    points = [(line["iteration"], line[key]) for line in history if line.get(key) is not None]
    iterations, values = np.array(points, dtype=float).reshape(-1, 2).T
    return iterations, values


def _prepare(ax: Axes, title: str) -> None:
    ax.set_title(title, loc="left", fontsize=12, fontweight="bold", color=BLACK)
    ax.grid(color="#e4e8eb", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("#b8c1c8")
    ax.tick_params(colors=GREY, labelbottom=True)
    ax.xaxis.label.set_color(GREY)


def _draw_missing(ax: Axes, text: str) -> None:
    ax.set_axis_off()  # the title stays
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", color=GREY)


def _draw_smoothed(ax: Axes, history: Sequence[dict], key: str, label: str, **style: Any) -> None:
    iterations, values = _series(history, key)
    ax.plot(iterations, values, linewidth=0.8, alpha=0.35, **style)
    mean = smooth(values)
    marker = "o" if len(values) == 1 else None  # a line through one point is invisible
    label = f"{label}  {_last(mean):.4g}"
    ax.plot(iterations, mean, linewidth=2, marker=marker, label=label, **style)


def _last(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite[-1]) if finite.size else float("nan")


def draw_losses(ax: Axes, history: Sequence[dict]) -> None:
    """Draw all losses, as written (thin) and smoothed."""
    _prepare(ax, "Losses")
    losses = sorted({key for line in history for key in line if key.startswith("loss_")})
    for i, key in enumerate(["total_loss", *losses]):
        _draw_smoothed(ax, history, key, key, color=_COLORS[i % len(_COLORS)])
    if any("fcos/loss_ctr_excess" in line for line in history):
        style = {"color": PURPLE, "linestyle": (0, (3, 1.5))}
        _draw_smoothed(ax, history, "fcos/loss_ctr_excess", "loss_ctr above its floor", **style)
    totals = _series(history, "total_loss")[1]
    totals = totals[np.isfinite(totals)]
    if totals.size:  # keep a spike at the start from flattening the rest; room for the legend
        ax.set_ylim(0, 1.35 * max(np.percentile(totals, 98), totals[-1]) or 1)
    ax.legend(frameon=False, fontsize=9)


def draw_metrics(ax: Axes, history: Sequence[dict]) -> None:
    """Draw AP; with several test sets Detectron2 prefixes keys with the name of the set."""
    _prepare(ax, "Evaluation, %")
    keys = sorted({key for line in history for key in line})
    matches = [
        (key, f"{key[: -len(metric)]} {label}".strip("/ "))
        for metric, label in _METRICS
        for key in keys
        if key == metric or key.endswith("/" + metric)
    ]
    if not matches:
        _draw_missing(ax, "no evaluation during training")
        return
    for i, (key, label) in enumerate(matches):
        iterations, values = _series(history, key)
        color = _COLORS[1 + i % (len(_COLORS) - 1)]
        label = f"{label}  {_last(values):.1f}"
        ax.plot(iterations, values, "o-", markersize=5, linewidth=2, color=color, label=label)
    ax.set_ylim(bottom=0)
    ax.legend(frameon=False, fontsize=9, loc="lower right")


def draw_learning_rate(ax: Axes, history: Sequence[dict]) -> None:
    """Draw the learning rate."""
    _prepare(ax, "Learning rate")
    iterations, values = _series(history, "lr")
    if not values.size:
        _draw_missing(ax, "not recorded")
        return
    marker = "o" if len(values) == 1 else None
    ax.plot(iterations, values, linewidth=2, marker=marker, color=BLUE)
    ax.yaxis.set_major_formatter("{x:g}")
    ax.set_ylim(bottom=0)


def draw_matching(ax: Axes, history: Sequence[dict]) -> None:
    """Draw positive locations (left axis) and the share of covered boxes (right axis)."""
    _prepare(ax, "Matching")
    if not any("fcos/num_pos" in line for line in history):
        _draw_missing(ax, "not recorded")
        return
    _draw_smoothed(ax, history, "fcos/num_pos", "positive locations", color=BLUE)
    ax.set_ylabel("positive locations", color=BLUE)
    ax.set_ylim(bottom=0)
    handles = ax.get_legend_handles_labels()[0]
    if any("fcos/gt_covered" in line for line in history):
        right = ax.twinx()
        right.spines[["top", "left", "bottom"]].set_visible(False)
        right.spines["right"].set_color("#b8c1c8")
        right.tick_params(colors=GREY)
        _draw_smoothed(right, history, "fcos/gt_covered", "boxes covered", color=ORANGE)
        right.set_ylabel("share of boxes with a location", color="#b07c1e")
        right.set_ylim(0, 1.05)
        handles += right.get_legend_handles_labels()[0]
    ax.legend(handles=handles, frameon=False, fontsize=9, loc="lower right")
