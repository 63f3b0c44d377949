"""When train_net.py draws a run, and what metrics.json holds by then."""

import argparse
import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch

from fcos_d2.engine import load_cfg, prepare_datasets

ROOT = Path(__file__).resolve().parents[1]
TINY = """
    MODEL.DEVICE cpu MODEL.FCOS.NUM_CLS_CONVS 1 MODEL.FCOS.NUM_BOX_CONVS 1
    INPUT.MIN_SIZE_TRAIN (64,) INPUT.MIN_SIZE_TEST 64 DATALOADER.NUM_WORKERS 0
    SOLVER.IMS_PER_BATCH 2 SOLVER.REFERENCE_IMS_PER_BATCH 2 SOLVER.WARMUP_ITERS 0
    DATASETS.TRAIN ('shapes:train:4',) DATASETS.TEST ('shapes:test:2',)
    SOLVER.MAX_ITER 5 TEST.EVAL_PERIOD 2 SOLVER.CHECKPOINT_PERIOD 2
""".split()


@pytest.fixture
def train_net():
    spec = importlib.util.spec_from_file_location("train_net", ROOT / "train_net.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def make_cfg(tmp_path, monkeypatch):
    """The config of a tiny run: ``make_cfg(KEY, VALUE, ...)``."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))

    def make(*opts):
        opts = [*TINY, "OUTPUT_DIR", str(tmp_path / "out"), *opts]
        cfg = load_cfg(str(ROOT / "configs" / "FCOS_Shapes.yaml"), opts)
        prepare_datasets(cfg)
        os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
        return cfg

    return make


@pytest.fixture
def drawn(train_net, monkeypatch):
    """What was there to draw, each time: iterations of metrics.json, and of evaluation.json."""
    seen = []

    def write_report(folder):
        (table,) = Path(folder).glob("inference/*/evaluation.json")
        iteration = json.loads(table.read_text())["model"]["iteration"]
        lines = map(json.loads, (Path(folder) / "metrics.json").read_text().splitlines())
        evaluated = [line["iteration"] for line in lines if "bbox/AP" in line]
        seen.append((evaluated, iteration))
        return []

    monkeypatch.setattr(train_net, "write_report", write_report)
    return seen


def fail_at(monkeypatch, train_net, iteration, error):
    """Let training end by ``error`` in place of an iteration."""
    step = train_net.Trainer.run_step

    def run_step(trainer):
        if trainer.iter == iteration:
            raise error
        step(trainer)

    monkeypatch.setattr(train_net.Trainer, "run_step", run_step)


def test_each_evaluation_is_drawn_once(train_net, make_cfg, drawn):
    """Those after 2 and 4 iterations and the last one, long before the 20 of Detectron2's writer.

    Detectron2 counts the iteration of the last one on.
    """
    results = train_net.train(make_cfg(), resume=False)
    assert drawn == [([1], 1), ([1, 3], 3), ([1, 3, 5], 4)]
    assert {"bbox", "voc"} == set(results)
    # Nothing is left to train and to evaluate; it is drawn all the same.
    assert train_net.train(make_cfg(), resume=True) is None
    assert drawn[3:] == [([1, 3, 5], 4)]


def test_drawing_changes_no_training(train_net, make_cfg, monkeypatch, tmp_path):
    """The weights of a run with two reports before its end, and those of one without."""
    pages = []
    report = train_net.write_report
    monkeypatch.setattr(
        train_net, "write_report", lambda folder: pages.append(report(folder)) or pages[-1]
    )
    for name, period in (("often", "2"), ("once", "0")):
        torch.manual_seed(0)
        options = ("TEST.EVAL_PERIOD", period, "OUTPUT_DIR", str(tmp_path / name))
        train_net.train(make_cfg(*options), resume=False)
    assert [paths[-1].parent.name for paths in pages] == ["often", "often", "often", "once"]
    often, once = (torch.load(tmp_path / x / "model_final.pth")["model"] for x in ("often", "once"))
    assert all(torch.equal(often[key], x) for key, x in once.items())


@pytest.mark.parametrize("error", [FloatingPointError, RuntimeError, KeyboardInterrupt])
def test_a_run_that_fails_is_drawn(train_net, make_cfg, drawn, monkeypatch, error):
    fail_at(monkeypatch, train_net, 3, error("at iteration 3"))
    with pytest.raises(error, match="at iteration 3"):
        train_net.train(make_cfg(), resume=False)
    assert drawn == [([1], 1), ([1], 1)]


def test_two_ranks_wait_for_the_report_of_a_run_that_fails(torchrun, monkeypatch, tmp_path):
    """All have the error of a loss that is nan; torchrun ends the others when one has ended."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    config = ("--config-file", ROOT / "configs" / "FCOS_Shapes.yaml")
    options = ("SOLVER.BASE_LR", "1e7", "SOLVER.CLIP_GRADIENTS.ENABLED", "False")
    options += ("TEST.EVAL_PERIOD", "0", "OUTPUT_DIR", tmp_path / "out")
    text = torchrun(ROOT / "train_net.py", *config, *TINY, *options, ok=False)
    assert "FloatingPointError: Training stopped at iteration" in text
    assert text.count("report.html") == 2  # logged and printed, once
    assert (tmp_path / "out" / "report.html").is_file()


def test_a_run_that_stops_early_is_drawn_with_its_last_evaluation(train_net, make_cfg, drawn):
    """With a learning rate of 0 the second evaluation is as the first, and no better."""
    options = ("SOLVER.BASE_LR", "0.0", "TEST.EARLY_STOP_PATIENCE", "1")
    assert train_net.train(make_cfg(*options), resume=False)
    assert drawn == [([1], 1), ([1, 3], 3)]


def test_what_goes_wrong_in_drawing_takes_nothing_away(train_net, monkeypatch, capsys, caplog):
    monkeypatch.setattr(train_net, "write_report", lambda folder: [f"{folder}/report.html"])
    train_net.draw("run")
    assert capsys.readouterr().out == "Wrote run/report.html\n"
    monkeypatch.setattr(train_net, "write_report", lambda folder: 1 / 0)
    train_net.draw("run")
    assert "The report of run can't be made" in caplog.text and "ZeroDivision" in caplog.text


def test_the_main_process_alone_draws(train_net, drawn, monkeypatch):
    monkeypatch.setattr(train_net.comm, "is_main_process", lambda: False)
    train_net.draw("nowhere")
    assert drawn == []


def test_evaluation_alone_is_drawn(train_net, make_cfg, drawn, monkeypatch, tmp_path):
    """With the file as it was named."""
    train_net.train(make_cfg("SOLVER.MAX_ITER", "1"), resume=False)
    weights = str(tmp_path / "out" / "model_final.pth")
    cfg = make_cfg("MODEL.WEIGHTS", weights)
    monkeypatch.setattr(train_net, "setup", lambda args: cfg)
    results = train_net.main(argparse.Namespace(eval_only=True, resume=False))
    assert drawn == [([1], 0), ([1], 0)]
    table = tmp_path / "out" / "inference" / "shapes_test_2" / "evaluation.json"
    assert json.loads(table.read_text())["model"]["weights"] == weights
    assert {"bbox", "voc"} == set(results)
