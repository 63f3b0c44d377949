"""What a run has left in its folder when `train_net.py` draws its report."""

import importlib
import json
from pathlib import Path

import pytest

from fcos_d2.engine import default_argument_parser, launch

ROOT = Path(__file__).resolve().parents[1]
TINY = """
    MODEL.DEVICE cpu MODEL.FCOS.NUM_CLS_CONVS 1 MODEL.FCOS.NUM_BOX_CONVS 1
    INPUT.MIN_SIZE_TRAIN (64,) INPUT.MIN_SIZE_TEST 64 DATALOADER.NUM_WORKERS 0
    SOLVER.IMS_PER_BATCH 2 SOLVER.REFERENCE_IMS_PER_BATCH 2 SOLVER.WARMUP_ITERS 0
    DATASETS.TRAIN ('shapes:train:4',) DATASETS.TEST ('shapes:test:2',)
    SOLVER.MAX_ITER 5 TEST.EVAL_PERIOD 2 SOLVER.CHECKPOINT_PERIOD 2
""".split()


@pytest.fixture
def train_net(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("train_net")


@pytest.fixture
def run(train_net, tmp_path, monkeypatch):
    """Run ``train_net.py`` in this process: ``run(*options)``."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))

    def launch_main(*options):
        config = ("--config-file", str(ROOT / "configs" / "FCOS_Shapes.yaml"))
        flags = [option for option in options if option.startswith("--")]
        opts = [*TINY, "OUTPUT_DIR", str(tmp_path / "out"), *options[len(flags) :]]
        launch(train_net.main, default_argument_parser().parse_args([*config, *flags, *opts]))

    return launch_main


@pytest.fixture
def drawn(monkeypatch):
    """Evaluated iterations in metrics.json, and evaluation.json's model, for each report."""
    seen = []

    def write_report(folder):
        (table,) = Path(folder).glob("inference/*/evaluation.json")
        lines = map(json.loads, (Path(folder) / "metrics.json").read_text().splitlines())
        evaluated = [line["iteration"] for line in lines if "bbox/AP" in line]
        seen.append((evaluated, json.loads(table.read_text())["model"]))
        return []

    module = importlib.import_module("fcos_d2.engine.launch")
    monkeypatch.setattr(module, "write_report", write_report)
    return seen


@pytest.mark.slow
def test_a_run_is_drawn_once_with_all_evaluations(run, drawn, tmp_path):
    """Those after 2 and 4 iterations, long before the 20 of Detectron2's writer, and the last.

    Detectron2 counts the iteration of the last one on.
    """
    run()
    (evaluated, model), *others = drawn
    assert evaluated == [1, 3, 5] and model["iteration"] == 4 and not others
    run("--resume")  # nothing is left to train or evaluate
    assert drawn[1:] == [([1, 3, 5], model)]
    weights = str(tmp_path / "out" / "model_final.pth")
    run("--eval-only", "MODEL.WEIGHTS", weights)
    assert drawn[2:] == [([1, 3, 5], {**model, "weights": weights})]


@pytest.mark.slow
def test_a_run_that_stops_early_is_drawn_with_its_last_evaluation(run, drawn):
    """With a learning rate of 0 the second evaluation equals the first."""
    run("SOLVER.BASE_LR", "0.0", "TEST.EARLY_STOP_PATIENCE", "1")
    ((evaluated, model),) = drawn
    assert evaluated == [1, 3] and model["iteration"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("error", [FloatingPointError, RuntimeError, KeyboardInterrupt])
def test_a_run_that_fails_is_drawn(run, train_net, drawn, monkeypatch, error):
    step = train_net.Trainer.run_step

    def run_step(trainer):
        if trainer.iter == 3:
            raise error("at iteration 3")
        step(trainer)

    monkeypatch.setattr(train_net.Trainer, "run_step", run_step)
    with pytest.raises(error, match="at iteration 3"):
        run()
    ((evaluated, model),) = drawn
    assert evaluated == [1] and model["iteration"] == 1
