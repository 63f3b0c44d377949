"""The command line of plot_run."""

import json
import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).resolve().parents[2] / "tools" / "plot_run.py"


def call(*arguments):
    """Run the tool as a user does."""
    command = [sys.executable, "-W", "ignore", str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_it_draws_and_prints_where(tmp_path):
    line = {"iteration": 19, "total_loss": 1.0}
    (tmp_path / "metrics.json").write_text(json.dumps(line) + "\n")
    done = call(tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'training_curves.png'}\n"
    assert "config.yaml is missing" in done.stderr
    assert (tmp_path / "training_curves.png").is_file()


def test_an_error_is_one_line(tmp_path):
    done = call(tmp_path / "nowhere")
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.startswith("plot_run:") and done.stderr.count("\n") == 1
    assert "nowhere" in done.stderr
