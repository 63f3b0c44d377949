"""Cases, options and results of a benchmark."""

import argparse
import importlib
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fcos_d2.environment import describe_environment
from fcos_d2.modeling.optimize import optimize_for_inference
from peers import NAMES, OURS, build_peers, why_missing

from .agreement import check_detections
from .growth import measure_growth
from .inputs import Case
from .measure import Job, measure
from .parts import JOBS, Setup

logger = logging.getLogger(__name__)

PARTS = tuple(JOBS)
PRECISIONS = ("fp32", "tf32", "bf16")
# What a part is measured with unless other batches or sizes are asked for.
CASES: dict[str, list[Case]] = {
    "match": [Case(4, 800, 1333, 200), Case(4, 800, 1066, 8)],
    "loss": [Case(4, 800, 1066, 8)],
    "decode": [Case(1, 800, 1066, 150), Case(8, 800, 1066, 150)],
    "train": [Case(2, 512, 512, 200), Case(2, 512, 512, 8)],
    "infer": [Case(1, 512, 512, 0), Case(1, 800, 1066, 0)],
    "loader": [Case(2, 3000, 4000, 8), Case(2, 375, 500, 8)],
}


def run_benchmark(options: argparse.Namespace) -> dict[str, Any]:
    """Measure, and return ``environment``, ``options``, ``left_out``, ``rows`` and ``growth``.

    Args:
        options: parsed by :func:`benchmark.__main__.get_parser`.

    Raises:
        ValueError: this machine lacks something that is asked for.
        DisagreementError: a peer and fcos_d2 give different results.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch finds no CUDA device.")
    if options.device == "cpu" and "tf32" in (options.precisions or ()):
        raise ValueError("--dtype tf32 exists on CUDA devices only.")
    names, left_out = choose_peers(options.peers)
    environment = describe_environment(options.device)  # its load average is that before the run
    if "adelaidet" in names:
        adet = importlib.import_module("adet")
        environment["adelaidet"] = getattr(adet, "__version__", "unknown")
    peers = build_peers(names, options.depth, options.device)
    if options.compiled:
        try:
            optimize_for_inference(peers[0].model, compile=True)
        except RuntimeError as error:
            raise ValueError(f"--compile: {error}") from error
    check_detections(peers, Case(2, 256, 320, 0), options.device)
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        setup = Setup(
            peers=peers,
            device=options.device,
            precisions=_precisions(options),
            compiled=options.compiled,
            folder=Path(folder),
        )
        for part in options.parts:
            for case in cases_of(part, options.batches, options.sizes):
                for make_jobs in JOBS[part]:
                    jobs = make_jobs(setup, case)
                    rows += _measure_jobs(jobs, part, case, options.rounds, options.device)
    return {
        "environment": environment,
        "options": {k: v for k, v in vars(options).items() if not isinstance(v, Path)},
        "left_out": left_out,
        "rows": rows,
        "growth": measure_growth(setup, options.rounds) if options.growth else [],
    }


def choose_peers(asked: Sequence[str] | None) -> tuple[list[str], dict[str, str]]:
    """Return the peers to measure, and for each skipped one the reason.

    Raises:
        ValueError: one that is asked for can't be imported.
    """
    reasons = {name: why_missing(name) for name in (NAMES if asked is None else asked)}
    missing = {name: reason for name, reason in reasons.items() if reason}
    if asked is not None and missing:
        raise ValueError("; ".join(f"--peers {name}: {why}" for name, why in missing.items()))
    for name, reason in missing.items():
        logger.warning("%s is skipped: %s", name, reason)
    return [name for name in reasons if name not in missing], missing


def cases_of(
    part: str,
    batches: Sequence[int] | None = None,
    sizes: Sequence[tuple[int, int]] | None = None,
) -> list[Case]:
    """Return the cases of a part, with other batches and sizes where these are given."""
    if part == "loader":  # the size of its files is not that of the network's input
        return CASES[part]
    result = [
        Case(batch, *size, case.boxes)
        for case in CASES[part]
        for size in (sizes or [(case.height, case.width)])
        for batch in (batches or [case.batch])
    ]
    return list(dict.fromkeys(result))


def _precisions(options: argparse.Namespace) -> dict[str, list[str]]:
    """Return the precisions of infer and of train."""
    if options.precisions is not None:
        return {part: list(options.precisions) for part in ("infer", "train")}
    if options.device == "cuda":
        return {part: list(PRECISIONS) for part in ("infer", "train")}
    has_bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return {"infer": ["fp32", "bf16"] if has_bf16 else ["fp32"], "train": ["fp32"]}


def _measure_jobs(
    jobs: Sequence[Job], part: str, case: Case, rounds: int, device: str
) -> list[dict]:
    label = f"{part} {case.batch}x{case.height}x{case.width}"
    with tqdm(total=rounds * len(jobs), desc=label, leave=False) as progress:
        results = measure(jobs, rounds, device, tick=progress.update)
    rows = [
        {
            "part": part,
            **case._asdict(),
            "name": job.name,
            "variant": job.variant,
            "precision": job.precision,
            "compiled": job.compiled,
            "median_ms": result.median,
            "min_ms": min(result.times),
            "max_ms": max(result.times),
            "peak_mib": result.peak_mib,
            "syncs": result.syncs,
            "kernels": result.kernels,
            "images_per_s": 1000 * case.batch / result.median,
        }
        for job, result in zip(jobs, results, strict=True)
    ]
    add_ratios(rows)
    return rows


def add_ratios(rows: list[dict]) -> None:
    """Add ``speedup``: how many times as fast a row is as the fastest peer.

    Peers of the same precision and compilation count.
    """

    def key(row: dict) -> tuple[str, bool]:
        return row["precision"], row["compiled"]

    peers = [row for row in rows if row["name"] != OURS]
    for row in rows:
        times = [x["median_ms"] for x in peers if key(x) == key(row)]
        row["speedup"] = min(times) / row["median_ms"] if times else None
