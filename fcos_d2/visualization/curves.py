"""Training curves out of Detectron2's metrics.json."""

import json
import logging
import os
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..files import atomic_path

logger = logging.getLogger(__name__)

# Okabe and Ito's palette, which colour-blind readers can tell apart.
_COLORS = ("#22303c", "#d55e00", "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#8d6b4f")
_GREY = "#5f6b76"
_MEASURES = (("bbox/AP", "AP"), ("bbox/AP50", "AP50"), ("voc/AP50_area", "VOC AP50 (area)"))


def plot_training_curves(metrics_json: str | os.PathLike, output_png: str | os.PathLike) -> None:
    """Draw losses, learning rate, AP and the matcher's counts over the iterations.

    Each loss is drawn as written (thin) and as a moving average over a twentieth of the points
    (thick). Panels of what was not recorded say so.

    Args:
        metrics_json: the JSON lines that Detectron2's ``JSONWriter`` writes.
        output_png: the picture, written atomically.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no line of training.
    """
    history = read_metrics(metrics_json)
    if not any("total_loss" in line for line in history):
        raise ValueError(
            f"{metrics_json} has no line of training (none with 'total_loss'): train for at least "
            "one log period (20 iterations) first"
        )
    figure = Figure(figsize=(13, 8), dpi=110, layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    axes = figure.subplots(2, 2, sharex=True)
    draw_losses(axes[0, 0], history)
    draw_measures(axes[0, 1], history)
    draw_learning_rate(axes[1, 0], history)
    draw_matching(axes[1, 1], history)
    for ax in axes[1]:
        ax.set_xlabel("iteration")
    with atomic_path(output_png) as temporary:
        figure.savefig(temporary, format="png")


def read_metrics(metrics_json: str | os.PathLike) -> list[dict]:
    """The lines of metrics.json by rising iteration, one dict an iteration.

    When the iteration goes back, the run was resumed (or started again) from there, so what the
    earlier attempt wrote from that iteration on is dropped. Lines of one iteration are merged, the
    last value winning. A line that a kill broke off is passed over with a warning.

    Raises:
        FileNotFoundError: there is no such file.
    """
    history: dict[int, dict] = {}
    with open(metrics_json, encoding="utf-8") as file:
        for number, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                line = json.loads(text)
                iteration = int(line["iteration"])
            except (ValueError, KeyError, TypeError):
                logger.warning(
                    "%s: line %d is not a whole record, passed over", metrics_json, number
                )
                continue
            if history and iteration < max(history):
                history = {key: kept for key, kept in history.items() if key < iteration}
            history.setdefault(iteration, {}).update(line)
    return [history[iteration] for iteration in sorted(history)]


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving average over a twentieth of the points; nan is left out of it.

    Args:
        values: (N,).

    Returns:
        (N,); at the ends over the points that there are.
    """
    window = np.ones(2 * (len(values) // 40) + 1)
    finite = np.isfinite(values)
    total = np.convolve(np.where(finite, values, 0.0), window, mode="full")
    count = np.convolve(finite.astype(float), window, mode="full")
    half = len(window) // 2
    inside = slice(half, half + len(values))
    return np.where(count[inside] > 0, total[inside] / np.maximum(count[inside], 1), np.nan)


def _series(history: Sequence[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Iterations and values of one key, where it was written."""
    points = [(line["iteration"], line[key]) for line in history if line.get(key) is not None]
    iterations, values = np.array(points, dtype=float).reshape(-1, 2).T
    return iterations, values


def _prepare(ax: Axes, title: str) -> None:
    ax.set_title(title, loc="left", fontsize=12, fontweight="bold", color=_COLORS[0])
    ax.grid(color="#e4e8eb", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("#b8c1c8")
    ax.tick_params(colors=_GREY, labelbottom=True)
    ax.xaxis.label.set_color(_GREY)


def _say_missing(ax: Axes, text: str) -> None:
    ax.set_axis_off()  # the title stays
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", color=_GREY)


def _draw_smoothed(ax: Axes, history: Sequence[dict], key: str, label: str, **style) -> None:
    iterations, values = _series(history, key)
    ax.plot(iterations, values, linewidth=0.8, alpha=0.35, **style)
    mean = smooth(values)
    marker = "o" if len(values) == 1 else None  # a line through one point shows nothing
    label = f"{label}  {_last(mean):.4g}"
    ax.plot(iterations, mean, linewidth=2, marker=marker, label=label, **style)


def _last(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite[-1]) if finite.size else float("nan")


def draw_losses(ax: Axes, history: Sequence[dict]) -> None:
    """Draw all losses over iterations, as written (thin) and smoothed."""
    _prepare(ax, "Losses")
    written = sorted({key for line in history for key in line if key.startswith("loss_")})
    for i, key in enumerate(["total_loss", *written]):
        _draw_smoothed(ax, history, key, key, color=_COLORS[i % len(_COLORS)])
    if any("fcos/loss_ctr_excess" in line for line in history):
        style = {"color": _COLORS[5], "linestyle": (0, (3, 1.5))}
        _draw_smoothed(ax, history, "fcos/loss_ctr_excess", "loss_ctr above its floor", **style)
    totals = _series(history, "total_loss")[1]
    totals = totals[np.isfinite(totals)]
    if totals.size:  # a spike at the start would press everything else flat; room for the legend
        ax.set_ylim(0, 1.35 * max(np.percentile(totals, 98), totals[-1]) or 1)
    ax.legend(frameon=False, fontsize=9)


def draw_measures(ax: Axes, history: Sequence[dict]) -> None:
    """AP over iterations; with several test sets Detectron2 puts the set's name before the key."""
    _prepare(ax, "Evaluation, %")
    keys = sorted({key for line in history for key in line})
    drawn = 0
    for end, label in _MEASURES:
        for key in keys:
            if key != end and not key.endswith("/" + end):
                continue
            iterations, values = _series(history, key)
            name = f"{key[: -len(end)]} {label}".strip("/ ")
            color = _COLORS[1 + drawn % (len(_COLORS) - 1)]
            text = f"{name}  {_last(values):.1f}"
            ax.plot(iterations, values, "o-", markersize=5, linewidth=2, color=color, label=text)
            drawn += 1
    if drawn:
        ax.set_ylim(bottom=0)
        ax.legend(frameon=False, fontsize=9, loc="lower right")
    else:
        _say_missing(ax, "no evaluation during training")


def draw_learning_rate(ax: Axes, history: Sequence[dict]) -> None:
    """Draw the learning rate over iterations."""
    _prepare(ax, "Learning rate")
    iterations, values = _series(history, "lr")
    if not values.size:
        _say_missing(ax, "not recorded")
        return
    marker = "o" if len(values) == 1 else None
    ax.plot(iterations, values, linewidth=2, marker=marker, color=_COLORS[2])
    ax.yaxis.set_major_formatter("{x:g}")
    ax.set_ylim(bottom=0)


def draw_matching(ax: Axes, history: Sequence[dict]) -> None:
    """Positive locations on the left axis, share of covered boxes on the right one."""
    _prepare(ax, "Matching")
    if not any("fcos/num_pos" in line for line in history):
        _say_missing(ax, "not recorded")
        return
    _draw_smoothed(ax, history, "fcos/num_pos", "positive locations", color=_COLORS[2])
    ax.set_ylabel("positive locations", color=_COLORS[2])
    ax.set_ylim(bottom=0)
    handles, labels = ax.get_legend_handles_labels()
    if any("fcos/gt_covered" in line for line in history):
        right = ax.twinx()
        right.spines[["top", "left", "bottom"]].set_visible(False)
        right.spines["right"].set_color("#b8c1c8")
        right.tick_params(colors=_GREY)
        _draw_smoothed(right, history, "fcos/gt_covered", "boxes covered", color=_COLORS[3])
        right.set_ylabel("share of boxes with a location", color="#b07c1e")
        right.set_ylim(0, 1.05)
        handles = [*handles, *right.get_legend_handles_labels()[0]]
        labels = [*labels, *right.get_legend_handles_labels()[1]]
    ax.legend(handles, labels, frameon=False, fontsize=9, loc="lower right")
