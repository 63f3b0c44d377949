"""The whole benchmark: which loads, in which order, and what comes out."""

import dataclasses
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fcos_d2.environment import describe_environment
from fcos_d2.modeling.optimize import optimize_for_inference

from .agreement import check_detections
from .growth import measure_growth
from .inputs import Case
from .loader import loader_entries
from .measure import convolution_flops, matmul_flops_per_second, measure
from .parts import ENTRIES, Bench, Entry, outside_entries
from .peers import OURS, build_peers, why_missing

logger = logging.getLogger(__name__)

PEERS = ("torchvision", "detectron2", "adelaidet")
PARTS = ("match", "loss", "decode", "train", "infer", "loader")
PRECISIONS = ("fp32", "tf32", "bf16")
# Batches, image sizes and boxes an image that a part is measured with unless others are asked for.
_LOADS: dict[str, list[Case]] = {
    "match": [Case(4, 800, 1333, 200), Case(4, 800, 1066, 8)],
    "loss": [Case(4, 800, 1066, 8)],
    "decode": [Case(1, 800, 1066, 150), Case(8, 800, 1066, 150)],
    "train": [Case(2, 512, 512, 200), Case(2, 512, 512, 8)],
    "infer": [Case(1, 512, 512, 0), Case(1, 800, 1066, 0)],
    "loader": [Case(2, 3000, 4000, 8), Case(2, 375, 500, 8)],
}


@dataclasses.dataclass
class Options:
    """What is measured, see ``tools/benchmark --help``."""

    peers: Sequence[str] | None = None
    device: str = "cpu"
    depth: int = 50
    parts: Sequence[str] = PARTS
    precisions: Sequence[str] | None = None
    compiled: bool = False
    batches: Sequence[int] | None = None
    sizes: Sequence[tuple[int, int]] | None = None
    rounds: int = 15
    growth: bool = False


def run_benchmark(options: Options) -> dict[str, Any]:
    """Measure, and return everything as data: ``environment``, ``options``, ``rows``, ``growth``.

    Raises:
        ValueError: something is asked for that this machine has not.
        DisagreementError: a peer and fcos_d2 give different results.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch finds no CUDA device here.")
    if options.device == "cpu" and "tf32" in (options.precisions or ()):
        raise ValueError("--dtype tf32 exists on CUDA devices only.")
    names, left_out = choose_peers(options.peers)
    environment = describe_environment(options.device, names)  # with the load before ours
    peers = build_peers(names, options.depth, options.device)
    if options.compiled:
        _check_compiler(peers[0].model)
    check_detections(peers, Case(2, 256, 320, 0), options.device)
    bench = Bench(
        peers, options.device, options.depth, _precisions(options), compiled=options.compiled
    )
    roofs: dict[str, float] = {}
    rows: list[dict] = []
    for part in options.parts:
        for case in cases_of(part, options.batches, options.sizes):
            rows += _measure_case(bench, part, case, options.rounds, roofs)
    return {
        "environment": environment,
        "options": dataclasses.asdict(options),
        "left_out": left_out,
        "rows": rows,
        "flops_per_second": roofs,
        "growth": measure_growth(bench, options.rounds) if options.growth else [],
    }


def choose_peers(asked: Sequence[str] | None) -> tuple[list[str], dict[str, str]]:
    """The peers to measure, and why others are left out.

    Raises:
        ValueError: one that is asked for can't be imported.
    """
    reasons = {name: why_missing(name) for name in (PEERS if asked is None else asked)}
    missing = {name: reason for name, reason in reasons.items() if reason}
    if asked is not None and missing:
        raise ValueError("; ".join(f"--peers {name}: {why}" for name, why in missing.items()))
    for name, reason in missing.items():
        logger.warning("left out: %s: %s", name, reason)
    return [name for name in reasons if name not in missing], missing


def cases_of(
    part: str,
    batches: Sequence[int] | None = None,
    sizes: Sequence[tuple[int, int]] | None = None,
) -> list[Case]:
    """The loads of a part: its own, with other batches and sizes where these are given."""
    cases = _LOADS[part]
    if part == "loader":  # the size of its files says nothing about the network's input
        return cases
    result = [
        Case(batch, *size, case.boxes)
        for case in cases
        for size in (sizes or [(case.height, case.width)])
        for batch in (batches or [case.batch])
    ]
    return list(dict.fromkeys(result))


def _precisions(options: Options) -> dict[str, list[str]]:
    """The precisions of infer and of train."""
    if options.precisions is not None:
        return {part: list(options.precisions) for part in ("infer", "train")}
    if options.device == "cuda":
        return {part: list(PRECISIONS) for part in ("infer", "train")}
    return {"infer": ["fp32", "bf16"] if _has_bf16_instructions() else ["fp32"], "train": ["fp32"]}


def _has_bf16_instructions() -> bool:
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _check_compiler(model: torch.nn.Module) -> None:
    """Find out whether models can be compiled here before anything is measured."""
    try:
        optimize_for_inference(model, compile=True)
    except RuntimeError as error:
        raise ValueError(f"--compile: {error}") from error


def _measure_case(
    bench: Bench, part: str, case: Case, rounds: int, roofs: dict[str, float]
) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        if part == "loader":
            entries = loader_entries(case, Path(folder))
        else:
            entries = ENTRIES[part](bench, case)
        rows = _measure_entries(entries, part, case, rounds, bench.device)
    if part in ("train", "infer"):
        _add_roofline(rows, entries[0], roofs, bench.device)
    if part == "train":
        outside = outside_entries(bench, case)
        outside_rows = _measure_entries(outside, "outside", case, rounds, bench.device)
        times = {row["name"]: row["median_ms"] for row in outside_rows}
        for row in rows:
            if row["precision"] == "fp32" and not row["compiled"] and not row["variant"]:
                row["outside_ms"] = times[row["name"]]
                row["outside_share"] = times[row["name"]] / row["median_ms"]
    return rows


def _measure_entries(
    entries: Sequence[Entry], part: str, case: Case, rounds: int, device: str
) -> list[dict]:
    label = f"{part} {case.batch}x{case.height}x{case.width}"
    with tqdm(total=rounds * len(entries), desc=label, leave=False) as progress:
        results = measure([x.job for x in entries], rounds, device, tick=progress.update)
    rows = [
        {
            "part": part,
            **case._asdict(),
            "name": entry.job.name,
            "variant": entry.variant,
            "precision": entry.precision,
            "compiled": entry.compiled,
            "median_ms": result.median,
            "min_ms": min(result.times),
            "max_ms": max(result.times),
            "peak_mib": result.peak_mib,
            "syncs": result.syncs,
            "kernels": result.kernels,
            "images_per_s": 1000 * case.batch / result.median,
        }
        for entry, result in zip(entries, results, strict=True)
    ]
    _add_ratios(rows)
    return rows


def _add_ratios(rows: list[dict]) -> None:
    """Say how many times as fast as the fastest peer a row is.

    ``speedup`` compares with peers of the same precision and compilation, ``speedup_plain`` with
    the peers as they are: eager, in fp32.
    """
    peers = [row for row in rows if row["name"] != OURS]
    plain = [x["median_ms"] for x in peers if _kind(x) in (("fp32", False), ("", False))]
    for row in rows:
        same = [x["median_ms"] for x in peers if _kind(x) == _kind(row)]
        row["speedup"] = min(same) / row["median_ms"] if same else None
        row["speedup_plain"] = min(plain) / row["median_ms"] if plain else None


def _kind(row: dict) -> tuple[str, bool]:
    return row["precision"], row["compiled"]


def _add_roofline(rows: list[dict], plain: Entry, roofs: dict[str, float], device: str) -> None:
    """Share of the time that the convolutions would take at the speed of a large matmul."""
    flops = convolution_flops(plain.job)
    for row in rows:
        precision = row["precision"]
        if precision not in roofs:
            roofs[precision] = matmul_flops_per_second(precision, device)
        row["convolution_gflop"] = flops / 1e9
        row["roofline_share"] = flops / roofs[precision] / (row["median_ms"] / 1000)
