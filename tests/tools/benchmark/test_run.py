"""Cases, results and report of the benchmark."""

import pytest
import torch

from benchmark import run
from benchmark.__main__ import get_parser
from benchmark.inputs import Case
from benchmark.parts import OUTSIDE
from benchmark.run import PARTS, add_ratios, cases_of, choose_peers, run_benchmark
from benchmark.tables import format_report


def make_row(**changes):
    row = {"part": "train", "batch": 2, "height": 512, "width": 512, "boxes": 8, "variant": ""}
    row |= {"name": "fcos_d2", "precision": "fp32", "compiled": False, "median_ms": 1.0}
    row |= {"min_ms": 1.0, "max_ms": 1.0, "peak_mib": 1.0, "syncs": 2, "kernels": 3}
    row |= {"images_per_s": 100.0, "speedup": None}
    return row | changes


def make_results(rows):
    environment = {"cpu": "Some CPU", "cores": 2, "commit": None, "load_average": [0.5, 1.0, 2.0]}
    left_out = {"adelaidet": "it is not there"}
    return {"environment": environment, "left_out": left_out, "rows": rows}


def test_every_part_has_cases_of_its_own():
    for part in PARTS:
        assert cases_of(part)
    assert cases_of("match") == [Case(4, 800, 1333, 200), Case(4, 800, 1066, 8)]


def test_other_batches_and_sizes():
    assert cases_of("train", batches=[1, 8], sizes=[(64, 96)]) == [
        Case(1, 64, 96, 200),
        Case(8, 64, 96, 200),
        Case(1, 64, 96, 8),
        Case(8, 64, 96, 8),
    ]
    # The default sizes are two, which one size makes the same.
    assert cases_of("infer", sizes=[(64, 96)]) == [Case(1, 64, 96, 0)]
    assert cases_of("loader", batches=[64], sizes=[(64, 96)]) == cases_of("loader")


def test_ratios_are_to_the_fastest_peer():
    rows = [
        make_row(median_ms=2.0),
        make_row(name="torchvision", median_ms=10.0),
        make_row(name="detectron2", median_ms=6.0),
        make_row(median_ms=1.0, precision="bf16"),
        make_row(name="torchvision", median_ms=4.0, precision="bf16"),
        make_row(median_ms=0.5, compiled=True),
    ]
    add_ratios(rows)
    assert [x["speedup"] for x in rows] == [3.0, 0.6, 1.0, 4.0, 1.0, None]


def test_a_missing_peer_is_left_out_or_refused(monkeypatch):
    reasons = {"detectron2": "too old: get another", "adelaidet": ""}
    monkeypatch.setattr("benchmark.run.why_missing", lambda x: reasons.get(x, ""))
    names, left_out = choose_peers(None)
    assert names == ["torchvision", "adelaidet"]
    assert left_out == {"detectron2": "too old: get another"}
    assert choose_peers(["adelaidet"]) == (["adelaidet"], {})
    with pytest.raises(ValueError, match="--peers detectron2: too old: get another"):
        choose_peers(["torchvision", "detectron2"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_device():
    with pytest.raises(ValueError, match="--device cuda: PyTorch finds no CUDA device"):
        run_benchmark(get_parser().parse_args(["--device", "cuda"]))


@pytest.mark.slow
def test_everything_is_measured_of_everybody(monkeypatch):
    monkeypatch.setitem(run.CASES, "train", [Case(1, 64, 96, 8)])
    monkeypatch.setitem(run.CASES, "loader", [Case(1, 60, 80, 3)])
    options = "--peers torchvision --depth 18 --parts loss,decode,train,loader --batch 1"
    options += " --size 64x96 --rounds 2"
    rows = run_benchmark(get_parser().parse_args(options.split()))["rows"]
    assert [(x["part"], x["name"], x["variant"]) for x in rows] == [
        ("loss", "fcos_d2", ""),
        ("loss", "torchvision", ""),
        ("decode", "fcos_d2", ""),
        ("decode", "torchvision", ""),
        ("train", "fcos_d2", ""),
        ("train", "fcos_d2", "channels last"),
        ("train", "torchvision", ""),
        ("train", "fcos_d2", OUTSIDE),
        ("train", "torchvision", OUTSIDE),
        ("loader", "fcos_d2", "reduced JPEG decoding"),
        ("loader", "fcos_d2", "full JPEG decoding"),
        ("loader", "detectron2", "DatasetMapper"),
    ]
    for row in rows:
        assert 0 < row["min_ms"] <= row["median_ms"] <= row["max_ms"]
        assert row["images_per_s"] == pytest.approx(1000 / row["median_ms"])
        if row["part"] != "loader":
            assert row["peak_mib"] > 0 and row["kernels"] > 0 and row["syncs"] >= 0
    # The part of a training step is compared with the same part of the peers.
    assert rows[8]["speedup"] == 1 and rows[7]["median_ms"] < rows[4]["median_ms"]


def test_report():
    rows = [
        make_row(median_ms=1234.5),
        make_row(name="torchvision", median_ms=2469.0, speedup=1.0, syncs=None),
        make_row(variant=OUTSIDE, images_per_s=9000.0),
        make_row(variant="optimized", part="infer", precision="bf16", speedup=2.345),
        make_row(part="loader", variant="DatasetMapper", precision="", images_per_s=40.0),
    ]
    report = format_report(make_results(rows))
    lines = report.splitlines()
    assert lines[0] == "cpu Some CPU, cores 2, load_average [0.5, 1.0, 2.0]."
    assert "Left out: adelaidet: it is not there." in lines
    table = [x.replace(" ", "") for x in lines if x.startswith("|")]
    assert table[0] == "||medianms|min|max|vsfastestpeer|peakMiB|syncs|kernels|images/s|"
    assert table[2] == "|fcos_d2,fp32|1234|1|1||1|2|3|100|"
    assert table[3] == "|torchvision,fp32|2469|1|1|1x|1||3|100|"
    assert table[7].startswith("|fcos_d2,optimized,bf16|1|1|1|2.35x|")
    assert "2 images of 512x512, 8 boxes each:" in lines
    assert "those that a GPU would have" in report
    results = make_results(rows)
    results["environment"]["gpu"] = "Some GPU"
    report = format_report(results)
    assert "gpu Some GPU" in report and "would have" not in report
