"""The results of a benchmark as Markdown."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from tabulate import tabulate

from .loader import SHORT_EDGE
from .peers import OURS

_TITLES = {
    "match": "Matching: ground truth to targets",
    "loss": "Losses, forward and backward, from the outputs of the last convolutions",
    "decode": "Decoding and NMS, from the outputs of the head",
    "train": "Training step: forward, losses, backward",
    "infer": "Inference, from images to detections, without resizing",
    "loader": f"Training loader alone, one process, shorter side resized to {SHORT_EDGE} pixels",
}
_NOTES = {
    "match": "Inside: labels and indices of the boxes for fcos_d2, indices for torchvision, labels "
    "and boxes for Detectron2, labels and distances for AdelaiDet, as the losses of each need. The "
    "grid is there.",
    "loss": "Inside: what the head does to the outputs of its last convolutions (ReLU, permuting, "
    "joining the levels), the three losses, and the way back. Matches are there.",
    "decode": "All get fresh outputs each time, untimed: Detectron2 changes them in place. "
    "Detectron2 and AdelaiDet leave clipping to what follows.",
    "train": "Outside is all but backbone and head, both ways: grid, matching, losses and what the "
    "head does to the outputs of its last convolutions, timed alone. bf16 is autocast.",
    "infer": "Random weights whose class bias gives 900 candidates an image. bf16 is autocast, but "
    "in optimized models the weights themselves.",
    "loader": "Each loader reads the same files in the same order.",
}
_CPU_NOTE = (
    "On a CPU, syncs (waits of the host) and kernels are those that a GPU would have, told by the "
    "PyTorch operators that are called: those whose output's size depends on the data or that copy "
    "to the host, and those that are neither views nor allocations. Copies to the device are not "
    "counted."
)
# (heading, key, how it is shown); a column without any value is left out.
_COLUMNS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("median ms", "median_ms", lambda x: f"{x:.3g}" if x < 1000 else f"{x:.0f}"),
    ("min", "min_ms", lambda x: f"{x:.3g}" if x < 1000 else f"{x:.0f}"),
    ("max", "max_ms", lambda x: f"{x:.3g}" if x < 1000 else f"{x:.0f}"),
    ("vs fastest peer", "speedup", lambda x: f"{x:.3g}x"),
    ("vs fastest eager fp32", "speedup_plain", lambda x: f"{x:.3g}x"),
    ("peak MiB", "peak_mib", lambda x: f"{x:.3g}" if x < 1000 else f"{x:.0f}"),
    ("syncs", "syncs", str),
    ("kernels", "kernels", str),
    ("images/s", "images_per_s", lambda x: f"{x:.3g}"),
    ("outside ms", "outside_ms", lambda x: f"{x:.3g}"),
    ("outside", "outside_share", lambda x: f"{x:.2%}"),
    ("of the roof", "roofline_share", lambda x: f"{x:.0%}"),
)
_WITHOUT = {
    "match": {"images_per_s", "speedup_plain"},
    "loss": {"images_per_s", "speedup_plain"},
    "decode": {"images_per_s", "speedup_plain"},
    "loader": {"speedup_plain"},
}


def format_report(results: dict[str, Any]) -> str:
    """The whole report: environment, a table for each load, remarks."""
    blocks = [_environment(results["environment"])]
    blocks += [f"Left out: {name}: {why}." for name, why in results["left_out"].items()]
    rows = results["rows"]
    for part in dict.fromkeys(row["part"] for row in rows):
        blocks.append(f"### {_TITLES[part]}")
        mine = [row for row in rows if row["part"] == part]
        for load in dict.fromkeys(_load(row) for row in mine):
            blocks += [f"{load}:", _table(part, [row for row in mine if _load(row) == load])]
        blocks.append(_NOTES[part])
        if part == "loader":
            blocks += _keeps_up(rows)
    if results["flops_per_second"]:
        roofs = results["flops_per_second"].items()
        roof = ", ".join(f"{name} {value / 1e12:.3g}" for name, value in roofs)
        blocks.append(
            "The roof is what a large matrix product reached in the same run, in TFLOP/s: "
            f"{roof}. Its share is the time that the convolutions would take at that speed."
        )
    if "gpu" not in results["environment"]:
        blocks.append(_CPU_NOTE)
    return "\n\n".join(blocks) + "\n"


def _environment(environment: dict[str, Any]) -> str:
    values = {**environment, "load_average": " ".join(map(str, environment["load_average"]))}
    names = {"cpu": "CPU", "gpu": "GPU", "cuda": "CUDA", "cudnn": "cuDNN", "load_average": "load"}
    shown = [f"{names.get(key, key)} {value}" for key, value in values.items() if value is not None]
    return ", ".join(shown) + "."


def _load(row: dict) -> str:
    images = f"{row['batch']} image{'s' * (row['batch'] > 1)} of {row['height']}x{row['width']}"
    if row["part"] == "infer":
        return images
    if row["part"] == "decode":
        return f"{images}, {row['boxes']} objects each"
    return f"{images}, {row['boxes']} boxes each"


def _table(part: str, rows: Sequence[dict]) -> str:
    columns = [
        column
        for column in _COLUMNS
        if column[1] not in _WITHOUT.get(part, ())
        and any(row.get(column[1]) is not None for row in rows)
    ]
    body = [
        [_name(row), *("" if row.get(key) is None else show(row[key]) for _, key, show in columns)]
        for row in rows
    ]
    headers = ["", *(heading for heading, _, _ in columns)]
    align = ["left", *["right"] * len(columns)]
    return tabulate(body, headers, tablefmt="pipe", disable_numparse=True, colalign=align)


def _name(row: dict) -> str:
    compiled = "compiled" if row["compiled"] else ""
    precision = row["precision"] if row["part"] in ("train", "infer") else ""
    return ", ".join(x for x in (row["name"], row["variant"], precision, compiled) if x)


def _keeps_up(rows: Sequence[dict]) -> list[str]:
    """Set the loader beside the fastest training that was measured of fcos_d2."""
    trained = [row for row in rows if row["part"] == "train" and row["name"] == OURS]
    if not trained:
        return []
    best = max(trained, key=lambda row: row["images_per_s"])
    lines = [
        f"The model trains at up to {best['images_per_s']:.3g} images/s ({_load(best)}; "
        f"{_name(best)}). Loader processes that keep up with it:"
    ]
    for row in rows:
        if row["part"] == "loader":
            needed = math.ceil(best["images_per_s"] / row["images_per_s"])
            lines.append(f"- {_name(row)}, files of {row['height']}x{row['width']}: {needed}")
    return ["\n".join([lines[0], "", *lines[1:]])]
