"""The command line of the benchmark."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmark.__main__ import main

TOOL = Path(__file__).resolve().parents[3] / "tools" / "benchmark"


@pytest.mark.slow
def test_a_whole_run(tmp_path):
    options = "--peers torchvision --depth 18 --parts match,infer --dtype fp32 --batch 1"
    options += " --size 64x96 --rounds 2 --threads 1 --json"
    command = [sys.executable, "-W", "ignore", str(TOOL), *options.split()]
    path = tmp_path / "new" / "out.json"
    done = subprocess.run([*command, str(path)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("### Matching") == done.stdout.count("### Inference") == 1
    assert "match 1x64x96" in done.stderr and "USDT" not in done.stderr  # progress, no chatter
    results = json.loads(path.read_text())
    assert results["environment"]["threads"] == 1
    assert results["options"]["sizes"] == [[64, 96]]
    found = [(x["part"], x["name"], x["variant"], x["boxes"]) for x in results["rows"]]
    assert found == [
        ("match", "fcos_d2", "", 200),
        ("match", "torchvision", "", 200),
        ("match", "fcos_d2", "", 8),
        ("match", "torchvision", "", 8),
        ("infer", "fcos_d2", "", 0),
        ("infer", "torchvision", "", 0),
        ("infer", "fcos_d2", "optimized", 0),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--peers torchvision,mmdet", "'mmdet': some of torchvision,detectron2,adelaidet"),
        ("--parts match,nms", "'nms': some of match,loss"),
        ("--dtype fp8", "'fp8': some of fp32,tf32,bf16"),
        ("--size 512", "'512': must be HEIGHTxWIDTH in pixels, at least 32"),
        ("--size 512x16", "'512x16': must be HEIGHTxWIDTH in pixels"),
        ("--batch 1,0", "'0': must be a whole number from 1 on"),
        ("--rounds x", "'x': must be a whole number from 1 on"),
        ("--depth 34", "invalid choice: 34"),
    ],
)
def test_wrong_arguments(capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        main(arguments.split())
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--json", "--growth"])
def test_an_unwritable_path_is_refused_at_once(capsys, tmp_path, option):
    (tmp_path / "file").touch()
    for path, reason in ((tmp_path, "is a folder"), (tmp_path / "file" / "x", "file")):
        assert main([option, str(path)]) == 1
        out, err = capsys.readouterr()
        assert not out and err.startswith("benchmark:") and err.count("\n") == 1
        assert reason in err


def test_an_error_is_one_line(capsys):
    assert main(["--dtype", "tf32"]) == 1
    assert capsys.readouterr().err == "benchmark: --dtype tf32 exists on CUDA devices only.\n"
