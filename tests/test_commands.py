"""The command lines, run as a user runs them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]


def run(*command, cwd, ok=True):
    """Run one of the project's scripts and return its output."""
    result = subprocess.run(
        [sys.executable, str(ROOT / command[0]), *map(str, command[1:])],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert (result.returncode == 0) == ok, result.stdout
    return result.stdout


SCRIPTS = ["train_net.py", "demo.py", "tools/benchmark"]
SCRIPTS += [
    str(path.relative_to(ROOT))
    for path in sorted((ROOT / "tools").glob("*.py"))
    if "__main__" in path.read_text()
]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_comes_without_warnings(script, tmp_path):
    command = [sys.executable, str(ROOT / script), "--help"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and result.stdout.startswith("usage: ")
    assert result.stderr == ""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a tiny model trained for 25 iterations, the output, and the arguments."""
    folder = tmp_path_factory.mktemp("run")
    options = "MODEL.FCOS.NUM_CLS_CONVS 1 MODEL.FCOS.NUM_BOX_CONVS 1 SOLVER.IMS_PER_BATCH 2 "
    options += "SOLVER.MAX_ITER 25 TEST.EVAL_PERIOD 0 INPUT.MIN_SIZE_TRAIN (64,) "
    options += "INPUT.MIN_SIZE_TEST 64 MODEL.DEVICE cpu"
    options = [
        *options.split(),
        *("DATASETS.TRAIN", "('shapes:train:8',)", "DATASETS.TEST", "('shapes:test:4',)"),
    ]
    config = ("--config-file", ROOT / "configs" / "FCOS_Shapes.yaml")
    text = run("train_net.py", *config, *options, "OUTPUT_DIR", "out", cwd=folder)
    return folder, text, (*config, *options)


def test_training_logs_its_schedule_and_draws(trained):
    folder, text, _ = trained
    assert re.search(r"Batch of 2 images, recipe's 8: learning rate 0\.0025, 25 iterations", text)
    assert "Total inference pure compute time" in text
    for picture in ("training_curves.png", "detections.png"):
        assert f"Wrote out/{picture}" in text
        assert (folder / "out" / picture).stat().st_size > 5000


def test_evaluation_alone_gives_the_same_tables(trained):
    folder, _, options = trained
    run(
        *("train_net.py", *options[:2], "--eval-only", *options[2:], "OUTPUT_DIR", "again"),
        *("MODEL.WEIGHTS", "out/model_final.pth"),
        cwd=folder,
    )
    tables = [
        json.loads((folder / name / "inference" / "shapes_test_4" / "evaluation.json").read_text())
        for name in ("out", "again")
    ]
    models = [table.pop("model") for table in tables]
    assert tables[0] == tables[1]
    assert [model["weights"] for model in models] == [None, "out/model_final.pth"]
    assert models[0]["iteration"] == models[1]["iteration"] == 24
    assert (folder / "again" / "detections.png").is_file()


def test_demo_draws_images(trained):
    folder, _, options = trained
    images = folder / "datasets" / "shapes" / "test_4" / "JPEGImages"
    text = run(
        *("demo.py", *options[:2], "--input", images, "--output", "drawn", "--threshold", "0.1"),
        *("--opts", "MODEL.WEIGHTS", "out/model_final.pth", *options[2:]),
        cwd=folder,
    )
    assert "Wrote 4 of 4 images to drawn" in text
    assert len(list((folder / "drawn").iterdir())) == 4


def test_report_draws_again(trained):
    folder, _, _ = trained
    (folder / "out" / "detections.png").unlink()
    text = run("tools/report.py", "out", cwd=folder)
    assert "out/detections.png" in text
    assert (folder / "out" / "detections.png").is_file()


def test_wrong_number_of_classes_stops_before_the_output_folder(trained):
    folder, _, options = trained
    bad = (*options, "OUTPUT_DIR", "never", "MODEL.FCOS.NUM_CLASSES", "7")
    text = run("train_net.py", *bad, cwd=folder, ok=False)
    assert "set it to 6, or to -1" in text
    assert not (folder / "never").exists()
