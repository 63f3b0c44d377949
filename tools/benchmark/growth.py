"""Growth of the cost of matching, losses and decoding with boxes, image side and batch."""

import os
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm import tqdm

from fcos_d2.files import atomic_path
from peers import OURS

from .inputs import Case
from .measure import measure
from .parts import JOBS, Setup

_BASE = Case(batch=2, height=512, width=512, boxes=20)
_VALUES = {
    "boxes": (1, 3, 10, 30, 100, 300, 1000, 2000),
    "side": (256, 512, 1024, 2048),
    "batch": (1, 2, 4, 8, 16, 32),
}
_AXES = {"boxes": "boxes per image", "side": "image side, pixels", "batch": "images per batch"}
_TITLES = {
    "match": "Matching",
    "loss": "Losses, forward + backward",
    "decode": "Decoding and NMS",
}
_COLORS = {OURS: "#d1495b", "torchvision": "#22303c"}
_GREY = "#5f6b76"


def growth_cases(axis: str) -> list[tuple[int, Case]]:
    """Return the cases along an axis ("boxes", "side" or "batch"), all else as in the base."""
    if axis == "side":
        return [(x, _BASE._replace(height=x, width=x)) for x in _VALUES[axis]]
    return [(x, _BASE._replace(**{axis: x})) for x in _VALUES[axis]]


def measure_growth(setup: Setup, rounds: int) -> list[dict]:
    """Time fcos_d2 and torchvision along each axis.

    Returns:
        A dict with part, axis, value, name and the time in ms for each point.
    """
    peers = [x for x in setup.peers if x.name in _COLORS]
    both = Setup(peers, setup.device, setup.precisions)
    points = [
        (part, axis, value, case)
        for part in _TITLES
        for axis in _VALUES
        for value, case in growth_cases(axis)
    ]
    rows = []
    for part, axis, value, case in tqdm(points, desc="growth", leave=False):
        jobs = [job for make_jobs in JOBS[part] for job in make_jobs(both, case)]
        for job in jobs:
            job.countable = False
        for job, result in zip(jobs, measure(jobs, rounds, setup.device, 1), strict=True):
            row = {"part": part, "axis": axis, "value": value, "name": job.name}
            times = {"min_ms": min(result.times), "max_ms": max(result.times)}
            rows.append({**row, "median_ms": result.median, **times})
    return rows


def plot_growth(rows: Sequence[dict], output_png: str | os.PathLike) -> None:
    """Draw the times of :func:`measure_growth`: a row per part, a column per axis."""
    figure = Figure(figsize=(11, 8.5), dpi=110, layout="constrained", facecolor="white")
    axes = figure.subplots(len(_TITLES), len(_VALUES), sharey="row", sharex="col")
    for line, (part, title) in zip(axes, _TITLES.items(), strict=True):
        for ax, axis in zip(line, _VALUES, strict=True):
            _draw_panel(ax, [x for x in rows if x["part"] == part and x["axis"] == axis])
            ax.set_title(title, loc="left", fontsize=10.5)
        line[0].set_ylabel("ms", color=_GREY)
    for ax, axis in zip(axes[-1], _VALUES, strict=True):
        labels = [f"{x // 1000}k" if x % 1000 == 0 else str(x) for x in _VALUES[axis]]
        ax.set_xticks(_VALUES[axis], labels)
        ax.set_xlabel(_AXES[axis])
    axes[0, 0].legend(frameon=False, fontsize=9)
    base = f"else {_BASE.batch} images of {_BASE.height}x{_BASE.width} with {_BASE.boxes} boxes"
    figure.suptitle(f"How the cost grows ({base} each)", x=0.01, ha="left", fontsize=12)
    with atomic_path(output_png) as temporary:
        figure.savefig(temporary, format="png")


def _draw_panel(ax: Axes, rows: Sequence[dict]) -> None:
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.minorticks_off()
    ax.yaxis.set_major_formatter("{x:g}")
    ax.grid(True, color="#e3e7ea", linewidth=0.8)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(colors=_GREY, labelsize=8.5)
    for name, color in _COLORS.items():
        points = [x for x in rows if x["name"] == name]
        values = [x["value"] for x in points]
        low, high = ([x[key] for x in points] for key in ("min_ms", "max_ms"))
        ax.fill_between(values, low, high, color=color, alpha=0.15, linewidth=0)
        medians = [x["median_ms"] for x in points]
        ax.plot(values, medians, color=color, marker="o", markersize=3.5, label=name)
