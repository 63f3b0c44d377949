"""The command line of report."""

import importlib.util
import json
import logging
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "report.py"


@pytest.fixture
def main():
    """The function of the tool; a process of its own would mostly import."""
    spec = importlib.util.spec_from_file_location("report_tool", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    level = logging.getLogger("fcos_d2").level
    yield module.main
    logging.getLogger("fcos_d2").setLevel(level)


def test_files_are_written_and_printed(main, tmp_path, capsys, caplog):
    line = {"iteration": 19, "total_loss": 1.0, "lr": 0.1}
    (tmp_path / "metrics.json").write_text(json.dumps(line) + "\n")
    assert main([str(tmp_path)]) == 0
    written = [tmp_path / "training_curves.png", tmp_path / "report.html"]
    assert capsys.readouterr().out.split() == [*map(str, written)]
    assert "Training:" in caplog.text and "config.yaml" in caplog.text  # progress, missing inputs
    assert (tmp_path / "report.html").read_text().endswith("</html>")


def test_a_folder_without_a_run(main, tmp_path, capsys):
    (tmp_path / "holiday.txt").write_text("sun")
    assert main([str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert not out and err.startswith("report:") and err.count("\n") == 1
    assert f"{tmp_path} is not the output folder of a run" in err
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.txt"]
