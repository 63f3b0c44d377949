"""tools/rank_runs.py from its command line, on runs that are done."""

import importlib.util
import json
from pathlib import Path

import pytest
import yaml

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "rank_runs.py"
PLAN = {
    "config_file": "recipe.yaml",
    "opts": {"SOLVER.BASE_LR": 0.1},
    "base_seeds": [1],
    "runs": [{"choice": "more", "opts": {"SOLVER.BASE_LR": 0.2}}],
}


@pytest.fixture(scope="module")
def rank_runs():
    spec = importlib.util.spec_from_file_location("rank_runs", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def plan(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(PLAN))
    return path


def make_run(folder, rate, ap50, weights="w.pth"):
    """What a run that came to its end leaves."""
    (folder / "inference" / "val").mkdir(parents=True)
    (folder / "config.yaml").write_text("DATASETS: {TEST: [val]}")
    options = {"config_file": "recipe.yaml", "SOLVER.BASE_LR": rate, "MODEL.WEIGHTS": weights}
    (folder / "options.json").write_text(json.dumps({**options, "SEED": 1}))
    bbox = {"AP": ap50 / 2, "AP50": ap50, "AP75": 1.0}
    (folder / "inference" / "val" / "evaluation.json").write_text(json.dumps({"bbox": bbox}))


def test_options_behind_the_others(rank_runs, plan, tmp_path, capsys):
    """KEY VALUE pairs at the end, behind options, and nothing is left to run."""
    make_run(tmp_path / "out" / "base-seed1", 0.1, 20.0)
    make_run(tmp_path / "out" / "more-seed1", 0.2, 23.5)
    table = tmp_path / "table.md"
    arguments = [plan, "--output", tmp_path / "out", "--table", table, "MODEL.WEIGHTS", "w.pth"]
    assert rank_runs.main([str(x) for x in arguments]) == 0
    rows = [[x.strip() for x in line.split("|")[1:-1]] for line in table.read_text().splitlines()]
    assert rows[0] == ["choice", "seeds", "AP", "AP50", "AP75", "change", "spread"]
    assert rows[2] == ["more", "1", "11.8", "23.5", "1.0", "3.5", "nan"]
    assert rows[3][:4] == ["base", "1", "10.0", "20.0"]
    assert table.read_text().strip() in capsys.readouterr().out


def test_the_table_of_runs_that_are_under_way(rank_runs, plan, tmp_path, capsys):
    make_run(tmp_path / "out" / "base-seed1", 0.1, 20.0)
    arguments = [plan, "--only-table", "--output", tmp_path / "out", "MODEL.WEIGHTS", "w.pth"]
    assert rank_runs.main([str(x) for x in arguments]) == 0
    base, more = capsys.readouterr().out.splitlines()[2:]
    assert "base" in base and "20.0" in base
    assert "more" in more and "nan" in more


def test_a_run_that_fails_fails_the_command(rank_runs, plan, tmp_path, monkeypatch, capsys):
    make_run(tmp_path / "out" / "base-seed1", 0.1, 20.0)
    (tmp_path / "train.py").write_text("raise SystemExit('no such recipe')")
    monkeypatch.setattr(rank_runs, "TRAIN_NET", tmp_path / "train.py")
    arguments = [plan, "--output", tmp_path / "out", "MODEL.WEIGHTS", "w.pth"]
    assert rank_runs.main([str(x) for x in arguments]) == 1
    assert "20.0" in capsys.readouterr().out
    assert (tmp_path / "out" / "more-seed1" / "console.txt").read_text() == "no such recipe\n"


def test_what_is_wrong_is_said(rank_runs, plan, tmp_path, capsys):
    assert rank_runs.main([str(tmp_path / "none.yaml")]) == 1
    assert "none.yaml" in capsys.readouterr().err
    make_run(tmp_path / "out" / "base-seed1", 0.1, 20.0, weights="other.pth")
    arguments = [plan, "--only-table", "--output", tmp_path / "out", "MODEL.WEIGHTS", "w.pth"]
    assert rank_runs.main([str(x) for x in arguments]) == 1
    assert "base-seed1 holds a run with other options" in capsys.readouterr().err
