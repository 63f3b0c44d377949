"""tools/compare_checkpoint.py: a table, or one line about what is wrong."""

import importlib.util
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tool():
    spec = importlib.util.spec_from_file_location(
        "compare_checkpoint", ROOT / "tools" / "compare_checkpoint.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_table(tool, monkeypatch, tmp_path, capsys):
    """A file of torchvision's; the images are few, the default ones are test_parity.py's."""
    torch.save({"model": tool.random_checkpoint("torchvision", 3)}, tmp_path / "tv.pth")
    compare = tool.compare_checkpoint
    images = [{"image": torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)}]
    monkeypatch.setattr(
        tool, "compare_checkpoint", lambda c, source: compare(c, source, [images], [])
    )
    assert tool.main([str(tmp_path / "tv.pth")]) == 0
    printed = capsys.readouterr().out
    assert f"torch {torch.__version__}" in printed
    rows = dict(line.rsplit(maxsplit=1) for line in printed.splitlines() if line[:3].isalpha())
    assert rows["images whose detections are compared"] == "1"
    assert float(rows["scores, largest difference"]) < 1e-5


def test_what_can_not_be_compared(tool, tmp_path, capsys):
    assert tool.main([str(tmp_path / "nowhere.pth")]) == 1
    assert "nowhere.pth" in capsys.readouterr().err
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    assert tool.main([str(tmp_path / "other.pth")]) == 1
    assert "not recognised" in capsys.readouterr().err
