"""The results of a benchmark as Markdown."""

from collections.abc import Callable, Sequence
from typing import Any

from tabulate import tabulate

from .loader import SHORT_EDGE
from .parts import OUTSIDE

_TITLES = {
    "match": "Matching: ground truth to targets",
    "loss": "Losses, forward and backward, from the outputs of the last convolutions",
    "decode": "Decoding and NMS, from the outputs of the head",
    "train": "Training step: forward, losses, backward",
    "infer": "Inference, from images to detections, without resizing",
    "loader": f"Training loader alone, one process, shorter side resized to {SHORT_EDGE} pixels",
}
_NOTES = {
    "match": "The grid is given. The results are the inputs of each library's losses: labels and "
    "box indices for fcos_d2, indices for torchvision (`FCOS.compute_loss` with a head that "
    "returns them), labels and boxes for Detectron2 (`FCOS.label_anchors`), labels and distances "
    "for AdelaiDet.",
    "loss": "Matches are given. Included: the head after its last convolutions (ReLU, permuting, "
    "joining the levels), the three losses, and the backward pass.",
    "decode": "Grid and outputs are given; outputs are copied before each run, as Detectron2 "
    "changes them in place. Detectron2 and AdelaiDet do not clip boxes here.",
    "train": f"'{OUTSIDE}': grid, matching, losses and the head after its last convolutions, "
    "forward and backward, timed alone. bf16 is autocast.",
    "infer": "Random weights whose class bias gives 900 candidates per image. bf16 is autocast; "
    "optimized models have bf16 weights instead.",
    "loader": "Each loader reads the same files in the same order.",
}
_CPU_NOTE = (
    "On a CPU, syncs (host-device) and kernels are those that a GPU would have, counted by "
    "PyTorch operator: a sync where the size of the output depends on the data or a copy goes to "
    "the host, a kernel where the operator is neither a view nor an allocation. Copies to the "
    "device are not counted."
)


def _number(x: float) -> str:
    return f"{x:.3g}" if x < 1000 else f"{x:.0f}"


# (heading, key, format); columns without a value are dropped.
_COLUMNS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("median ms", "median_ms", _number),
    ("min", "min_ms", _number),
    ("max", "max_ms", _number),
    ("vs fastest peer", "speedup", lambda x: f"{x:.3g}x"),
    ("peak MiB", "peak_mib", _number),
    ("syncs", "syncs", str),
    ("kernels", "kernels", str),
    ("images/s", "images_per_s", lambda x: f"{x:.3g}"),
)
_NETWORK_PARTS = ("train", "infer")


def format_report(results: dict[str, Any]) -> str:
    """Format the whole report: environment, a table per case, notes."""
    environment = results["environment"].items()
    blocks = [", ".join(f"{key} {value}" for key, value in environment if value is not None) + "."]
    blocks += [f"Left out: {name}: {reason}." for name, reason in results["left_out"].items()]
    rows = results["rows"]
    for part in dict.fromkeys(row["part"] for row in rows):
        blocks.append(f"### {_TITLES[part]}")
        of_part = [row for row in rows if row["part"] == part]
        for case in dict.fromkeys(_case(row) for row in of_part):
            blocks += [f"{case}:", _table(part, [row for row in of_part if _case(row) == case])]
        blocks.append(_NOTES[part])
    if "gpu" not in results["environment"]:
        blocks.append(_CPU_NOTE)
    return "\n\n".join(blocks) + "\n"


def _case(row: dict) -> str:
    images = f"{row['batch']} image{'s' * (row['batch'] > 1)} of {row['height']}x{row['width']}"
    if row["part"] == "infer":
        return images
    return f"{images}, {row['boxes']} {'objects' if row['part'] == 'decode' else 'boxes'} each"


def _table(part: str, rows: Sequence[dict]) -> str:
    columns = [
        (heading, key, show)
        for heading, key, show in _COLUMNS
        if any(row[key] is not None for row in rows)
        and (key != "images_per_s" or part in (*_NETWORK_PARTS, "loader"))
    ]
    body = [
        [_name(row), *("" if row[key] is None else show(row[key]) for _, key, show in columns)]
        for row in rows
    ]
    headers = ["", *(heading for heading, _, _ in columns)]
    align = ["left", *["right"] * len(columns)]
    return tabulate(body, headers, tablefmt="pipe", disable_numparse=True, colalign=align)


def _name(row: dict) -> str:
    precision = row["precision"] if row["part"] in _NETWORK_PARTS else ""
    words = (row["name"], row["variant"], precision, "compiled" if row["compiled"] else "")
    return ", ".join(x for x in words if x)
