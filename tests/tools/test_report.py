"""The command line of report."""

import importlib.util
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "report.py"


@pytest.fixture
def main():
    """The tool's function; in a process of its own it would mostly import."""
    spec = importlib.util.spec_from_file_location("report_tool", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    level = logging.getLogger("fcos_d2").level
    yield module.main
    logging.getLogger("fcos_d2").setLevel(level)


def test_it_writes_and_prints_where(main, tmp_path, capsys, caplog):
    line = {"iteration": 19, "total_loss": 1.0, "lr": 0.1}
    (tmp_path / "metrics.json").write_text(json.dumps(line) + "\n")
    assert main([str(tmp_path)]) == 0
    written = [tmp_path / "training_curves.png", tmp_path / "report.html"]
    assert capsys.readouterr().out.split() == [*map(str, written)]
    assert "Training:" in caplog.text and "config.yaml" in caplog.text  # progress, what is missing
    assert (tmp_path / "report.html").read_text().endswith("</html>")


def test_a_folder_that_is_no_run(tmp_path):
    (tmp_path / "holiday.txt").write_text("sun")
    command = [sys.executable, "-W", "ignore", str(TOOL), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.startswith("report:") and done.stderr.count("\n") == 1
    assert f"{tmp_path} is no run" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.txt"]
