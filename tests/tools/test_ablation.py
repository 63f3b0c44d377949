"""Runs of one choice each: the plan, the runs that are left to make, the table."""

import json
import sys

import pytest
import yaml

import ablation
from ablation import BASE, Run, compare, execute, read_metrics, read_plan

# In place of train_net.py: AP50 is 100 times BASE_LR plus the seed; a learning rate of 9 fails.
STAND_IN = """
import json, pathlib, sys
keys = dict(zip(sys.argv[3::2], sys.argv[4::2]))
run = pathlib.Path(keys["OUTPUT_DIR"])
(run / "config.yaml").write_text("DATASETS: {TEST: ['voc:val', 'a']}")
folder = run / "inference" / "voc_val"
folder.mkdir(parents=True, exist_ok=True)
ap50 = 100 * float(keys["BASE_LR"]) + int(keys["SEED"])
bbox = {"AP": ap50 / 2, "AP50": ap50, "AP75": None}
(folder / "evaluation.json").write_text(json.dumps({"bbox": bbox}))
print("calls", sys.argv[1:3])
if keys["BASE_LR"] == "9": sys.exit("diverged")  # after an evaluation
"""
PLAN = {
    "config_file": "recipe.yaml",
    "opts": {"BASE_LR": 0.1, "BATCH": 4},
    "base_seeds": [1, 3],
    "runs": [
        {"choice": "higher rate", "opts": {"BASE_LR": 0.2}},
        {"choice": "too high", "opts": {"BASE_LR": 9}, "seeds": [7]},
    ],
}


@pytest.fixture
def plan(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(PLAN))
    return path


def run_all(plan, tmp_path):
    runs = read_plan(plan)
    execute((sys.executable, "-c", STAND_IN), runs, tmp_path / "out")
    return runs


def test_plan(plan):
    runs = read_plan(plan)
    assert runs == [
        Run(BASE, "recipe.yaml", {"BASE_LR": 0.1, "BATCH": 4}, 1),
        Run(BASE, "recipe.yaml", {"BASE_LR": 0.1, "BATCH": 4}, 3),
        Run("higher rate", "recipe.yaml", {"BASE_LR": 0.2, "BATCH": 4}, 1),
        Run("too high", "recipe.yaml", {"BASE_LR": 9, "BATCH": 4}, 7),
    ]
    assert [run.folder for run in runs][1:3] == ["base-seed3", "higher_rate-seed1"]


def test_options_over_those_of_the_plan(plan):
    """They reach every run, but what a run changes stays changed."""
    runs = read_plan(plan, ["BATCH", "8", "BASE_LR", "0.3"])
    assert runs[0].opts == {"BASE_LR": "0.3", "BATCH": "8"}
    assert runs[2].opts == {"BASE_LR": 0.2, "BATCH": "8"}
    with pytest.raises(ValueError, match="BASE_LR has no value"):
        read_plan(plan, ["BATCH", "8", "BASE_LR"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"opts": [1]}, r"list is not a subclass of Dict\[str, Any\]. value: \[1\]"),
        ({"base_seeds": []}, "'base_seeds' is empty"),
        ({"base_seeds": "???"}, "Missing mandatory value: base_seeds"),
        ({"learning_rate": 1}, "full_key: learning_rate"),
        ({"runs": [{"choice": "a", "opts": {}, "seeds": 2}]}, "full_key: seeds"),
        ({"runs": [{"choice": "a"}]}, r"Missing mandatory value: opts full_key: runs\[0\].opts"),
        ({"runs": [{"choice": "a", "opts": None}]}, "'opts' is not Optional"),
        ({"runs": [{"choice": "base", "opts": {}}]}, "two runs have the same folder base-seed1"),
    ],
)
def test_bad_plans(plan, change, message):
    plan.write_text(yaml.safe_dump({**PLAN, **change}))
    with pytest.raises(ValueError, match=message):
        read_plan(plan)


def test_a_plan_that_is_not_yaml(plan):
    plan.write_text("runs: [")
    with pytest.raises(ValueError, match="is not a plan"):
        read_plan(plan)


def test_runs_and_their_table(plan, tmp_path):
    """Base: 100 * 0.1 + 1 = 11 and + 3 = 13, mean 12, spread 2; higher rate: 20 + 1 = 21, + 9."""
    runs = run_all(plan, tmp_path)
    table = compare(runs, tmp_path / "out").set_index("choice")
    assert table.index.tolist() == ["higher rate", "base", "too high"]
    assert table.loc["base", ["seeds", "AP", "AP50", "spread", "change"]].tolist() == [
        2,
        6,
        12,
        2,
        0,
    ]
    assert table.loc["higher rate", ["seeds", "AP50", "change"]].tolist() == [1, 21, 9]
    assert table.loc["too high", "seeds"] == 0
    assert table.loc["too high", ["AP50", "change"]].isna().all()
    assert table.AP75.isna().all() and table.spread.isna()["higher rate"]
    console = (tmp_path / "out" / "base-seed1" / "console.txt").read_text()
    assert "calls ['--config-file', 'recipe.yaml']" in console


def test_what_is_done_is_not_done_again(plan, tmp_path):
    """A second time only the run that failed is made; one that lost its end is made anew."""
    run_all(plan, tmp_path)
    done = tmp_path / "out" / "higher_rate-seed1" / "console.txt"
    before = done.stat().st_mtime_ns
    failed = tmp_path / "out" / "too_high-seed7" / "console.txt"
    failed.unlink()
    run_all(plan, tmp_path)
    assert done.stat().st_mtime_ns == before
    assert failed.read_text().endswith("diverged\n")


def test_a_folder_of_other_options(plan, tmp_path):
    run_all(plan, tmp_path)
    plan.write_text(yaml.safe_dump({**PLAN, "opts": {"BASE_LR": 0.1, "BATCH": 8}}))
    with pytest.raises(ValueError, match="base-seed1 contains a run with other options"):
        run_all(plan, tmp_path)


def test_a_run_counts_once_it_is_done(plan, tmp_path):
    """A stopped run has left an evaluation of its middle, but no options.json."""
    runs = run_all(plan, tmp_path)
    (tmp_path / "out" / "base-seed3" / "options.json").unlink()
    table = compare(runs, tmp_path / "out").set_index("choice")
    assert table.loc["base", ["seeds", "AP50"]].tolist() == [1, 11]


def test_the_first_test_set_counts(plan, tmp_path):
    """The recipe's first, not that of the alphabet, which another evaluation left."""
    run_all(plan, tmp_path)
    folder = tmp_path / "out" / "base-seed1"
    (folder / "inference" / "a").mkdir()
    other = {"bbox": {"AP": 0.0, "AP50": 0.0, "AP75": 0.0}}
    (folder / "inference" / "a" / "evaluation.json").write_text(json.dumps(other))
    assert read_metrics(folder) == {"AP": 5.5, "AP50": 11, "AP75": None}


def test_command_line(plan, tmp_path, monkeypatch, capsys):
    """KEY VALUE pairs come last, behind options; a failed run fails the command."""
    (tmp_path / "train.py").write_text(STAND_IN)
    monkeypatch.setattr(ablation, "TRAIN_NET", tmp_path / "train.py")
    output, table = tmp_path / "out", tmp_path / "table.md"

    def main(*arguments):
        status = ablation.main([str(x) for x in arguments])
        return status, *capsys.readouterr()

    status, out, _ = main(plan, "--output", output, "--table", table, "BATCH", "8")
    assert status == 1 and table.read_text().strip() in out
    rows = [[x.strip() for x in line.split("|")[1:-1]] for line in table.read_text().splitlines()]
    assert rows[0] == ["choice", "seeds", "AP", "AP50", "AP75", "change", "spread"]
    assert rows[2] == ["higher rate", "1", "10.5", "21.0", "nan", "9.0", "nan"]
    assert rows[3][:4] == ["base", "2", "6.0", "12.0"]
    assert rows[4][:4] == ["too high", "0", "nan", "nan"]

    only_table = (plan, "--only-table", "--output", output)
    assert main(*only_table, "BATCH", "8")[:2] == (0, table.read_text())
    status, _, err = main(*only_table)
    assert status == 1 and "base-seed1 contains a run with other options" in err
    status, _, err = main(tmp_path / "none.yaml")
    assert status == 1 and "none.yaml" in err

    plan.write_text(yaml.safe_dump({**PLAN, "runs": PLAN["runs"][:1]}))
    assert main(plan, "--output", output, "BATCH", "8")[0] == 0
