"""The command line of convert_checkpoint."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import convert_checkpoint
from fcos_d2.checkpoint import read_info

from ..checkpoint.conftest import torchvision_state

TOOL = Path(__file__).resolve().parents[2] / "tools" / "convert_checkpoint.py"


@pytest.fixture
def call(capsys):
    """Run the tool in this process: ``call(*arguments)`` gives status, output and errors."""

    def run(*arguments):
        status = convert_checkpoint.main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def src(tmp_path):
    """A checkpoint of torchvision's FCOS on a ResNet-18, for a background and 3 classes."""
    torch.save({"model": torchvision_state(), "epoch": 25}, tmp_path / "a.pth")
    return tmp_path / "a.pth"


@pytest.mark.slow
def test_it_runs_as_a_command(src, tmp_path):
    command = [sys.executable, "-W", "ignore", str(TOOL), str(src), str(tmp_path / "b.pth")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert "FCOS of torchvision" in done.stdout
    assert read_info(str(tmp_path / "b.pth")).num_classes == 4


def test_report(call, src, tmp_path):
    (tmp_path / "names.txt").write_text("ball\nbox\n\ncone\n")
    dst = tmp_path / "b.pth"
    options = ("--opts", "MODEL.FCOS.SCORE_THRESH_TEST", "0.3")
    status, out, err = call(
        src, dst, "--from", "torchvision", "--classes", tmp_path / "names.txt", *options
    )
    assert status == 0, err
    assert "FCOS of torchvision" in out
    assert "\ncls_tower  " in out and "left over" in out
    assert "\n  MODEL.FCOS.LOCATION_OFFSET 0.0\n" in out
    assert "\n  MODEL.FCOS.SCORE_THRESH_TEST 0.3\n" in out
    assert "\n3 classes: ball, box, cone\n" in out
    assert out.endswith(f"\nWrote {dst}\n")
    info = read_info(str(dst))
    assert info.class_names == ["ball", "box", "cone"] and info.num_classes == 3
    assert info.cfg["MODEL.FCOS.SCORE_THRESH_TEST"] == 0.3


def test_partial(call, src, tmp_path):
    state = torch.load(src, weights_only=True)["model"]
    name = "head.regression_head.bbox_reg.bias"
    torch.save({key: x for key, x in state.items() if key != name}, src)
    status, out, err = call(src, tmp_path / "b.pth")
    assert status == 1 and f"missing, box_pred (1): {name}" in err
    assert not (tmp_path / "b.pth").exists()
    status, out, err = call(src, tmp_path / "b.pth", "--partial")
    assert status == 0, err
    assert "4 classes without names; set them by --classes FILE" in out
    weights = torch.load(tmp_path / "b.pth", weights_only=True)["model"]
    assert "proposal_generator.head.box_pred.bias" not in weights
    assert "proposal_generator.head.box_pred.weight" in weights


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"", "can't be read as a checkpoint"),
        (b"half", "can't be read as a checkpoint"),
        ("trap", "is refused"),
        ("unknown", "not recognised"),
    ],
)
def test_an_error_is_one_line(call, tmp_path, content, message):
    """A bad file: one line, exit status 1, the old result left as it was."""
    src, dst, ran = tmp_path / "a.pth", tmp_path / "b.pth", tmp_path / "ran"

    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(ran),)

    if isinstance(content, bytes):
        src.write_bytes(content)
    elif content:
        torch.save({"model": Trap() if content == "trap" else {"a": torch.zeros(1)}}, src)
    dst.write_bytes(b"old")
    status, out, err = call(src, dst)
    assert status == 1 and not out
    assert err.startswith("convert_checkpoint:") and err.count("\n") == 1
    assert message in err and "a.pth" in err
    assert dst.read_bytes() == b"old" and not ran.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pth", "b.pth"][content is None :]


def test_bad_options(call, src, tmp_path):
    (tmp_path / "none.txt").write_text("\n")
    for options, message in [
        (("--classes", tmp_path / "none.txt"), "has no class name"),
        (("--classes", tmp_path / "gone.txt"), "gone.txt"),
        (("--opts", "SOLVER.BASE_LR", "1"), "not stored with weights"),
    ]:
        status, out, err = call(src, tmp_path / "b.pth", *options)
        assert status == 1 and message in err and err.count("\n") == 1
    assert not (tmp_path / "b.pth").exists()
