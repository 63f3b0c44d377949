"""Training in several processes, and the report that is drawn when a run has ended."""

import importlib
import json
import re
from pathlib import Path

import pytest
import torch
from detectron2.engine import default_argument_parser

from fcos_d2.engine import Trainer, launch, setup
from fcos_d2.engine.commands import record_command

ROOT = Path(__file__).resolve().parents[2]


def parse(*arguments):
    return default_argument_parser().parse_args([*map(str, arguments)])


def refuse(args):
    """A main that must not be reached."""
    raise AssertionError(args)


def test_more_processes_than_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="--num-gpus 2 needs 2 CUDA devices.*has 0.*torchrun"):
        launch(refuse, parse("--num-gpus", 2))


def test_torchrun_sets_the_number_of_processes(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    with pytest.raises(ValueError, match="--num-gpus and --num-machines cannot be used under"):
        launch(refuse, parse("--num-gpus", 2))


@pytest.fixture
def drawn(monkeypatch):
    """Folders that a report was drawn of."""
    folders = []
    module = importlib.import_module("fcos_d2.engine.launch")
    monkeypatch.setattr(module, "write_report", lambda folder: folders.append(folder) or ["a.png"])
    return folders


@pytest.fixture
def main(tmp_path):
    """A main that leaves the trace of ``setup`` in its output folder, after those of older runs."""
    record_command(tmp_path / "run", ["train_net.py"], "cpu")

    def run(args):
        assert args.resume
        record_command(tmp_path / "run", ["train_net.py"], "cpu")

    return run


def test_a_report_is_drawn_after_the_run(main, drawn, tmp_path, capsys):
    launch(main, parse("--resume", "OUTPUT_DIR", tmp_path / "run"))
    assert drawn == [str(tmp_path / "run")]
    assert capsys.readouterr().out == "Wrote a.png\n"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_report_is_drawn_of_a_run_that_fails(main, drawn, tmp_path, error):
    def fail(args):
        main(args)
        raise error("in training")

    with pytest.raises(error, match="in training"):
        launch(fail, parse("--resume", "OUTPUT_DIR", tmp_path / "run"))
    assert drawn == [str(tmp_path / "run")]


def test_nothing_is_drawn_before_setup_or_on_another_machine(main, drawn, tmp_path, monkeypatch):
    """An earlier run has used the folder; an error of the config comes before this one does."""
    with pytest.raises(AssertionError):
        launch(refuse, parse("OUTPUT_DIR", tmp_path / "run"))
    with pytest.raises(AssertionError):
        launch(refuse, parse("OUTPUT_DIR", tmp_path / "new"))
    with pytest.raises((KeyError, AssertionError), match="NO_KEY"):
        launch(refuse, parse("NO_KEY", "1"))
    launch(main, parse("--resume", "--machine-rank", 1, "OUTPUT_DIR", tmp_path / "run"))
    assert drawn == []


def test_the_parent_of_several_processes_draws(main, drawn, tmp_path, monkeypatch):
    module = importlib.import_module("fcos_d2.engine.launch")
    calls = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        module, "detectron2_launch", lambda main, *x, args, **_: calls.append(x) or main(*args)
    )
    launch(main, parse("--resume", "--num-gpus", 2, "OUTPUT_DIR", tmp_path / "run"))
    assert calls == [(2,)] and len(drawn) == 1


def test_an_error_in_drawing_is_only_logged(main, drawn, tmp_path, monkeypatch):
    module = importlib.import_module("fcos_d2.engine.launch")
    logged = []
    monkeypatch.setattr(module, "write_report", lambda folder: 1 / 0)
    monkeypatch.setattr(module.logger, "exception", lambda text, *values: logged.append(text))
    launch(main, parse("--resume", "OUTPUT_DIR", tmp_path / "run"))
    assert logged == ["No report of %s:"] and drawn == []


@pytest.mark.slow
def test_two_ranks_train_as_one_process_does(make_args, torchrun, tmp_path):
    """Four iterations and a resume to six: the weights of one process that took all six.

    With either number of ranks the batches hold the same images, all padded to one size, with the
    same augmentation. Each message is logged, each file written and drawn once.
    """
    options = (
        *("INPUT.MIN_SIZE_TRAIN", "(64,)", "DATALOADER.ASPECT_RATIO_GROUPING", "False"),
        *("SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR", "SOLVER.STEPS", "()"),
        # A small rate: rounding differs, and a ReLU that flips sends two runs apart by that much.
        *("SOLVER.BASE_LR", "0.001"),
        *("SOLVER.WARMUP_ITERS", "2", "SOLVER.CHECKPOINT_PERIOD", "2", "SOLVER.MAX_ITER"),
    )
    first, rest = make_args(*options, "4"), make_args(*options, "6")
    command = (ROOT / "train_net.py", "--config-file", first.config_file)
    text = torchrun(*command, *first.opts)
    for once in ("Rank of current process: 0. World size: 2", "Starting training from iteration 0"):
        assert text.count(once) == 1
    assert len(re.findall("Wrote .*detections.png", text)) == 1
    assert len(re.findall(r"Saving checkpoint to .*model_0000001.pth", text)) == 1
    text = torchrun(*command, "--resume", *rest.opts)
    assert text.count("Starting training from iteration 4") == 1

    checkpoint, losses = read_run(tmp_path / "out")
    trainer = Trainer(setup(make_args(*options, "6", output="one")))
    trainer.resume_or_load(resume=False)
    trainer.train()
    wanted, wanted_losses = read_run(tmp_path / "one")
    assert checkpoint["iteration"] == wanted["iteration"] == 5
    for name, value in wanted["model"].items():
        torch.testing.assert_close(checkpoint["model"][name], value, rtol=0, atol=3e-5)
    assert losses == pytest.approx(wanted_losses, rel=1e-4)
    (report,) = (tmp_path / "out" / "inference").glob("*/evaluation.json")
    assert json.loads(report.read_text())["num_processed_images"] == 6
    assert (tmp_path / "out" / "training_curves.png").is_file()


def read_run(folder):
    """The last checkpoint and the last losses of a run."""
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    (last,) = (x for x in lines if x["iteration"] == 5 and "total_loss" in x)
    losses = {name: value for name, value in last.items() if "loss" in name and "fcos" not in name}
    return torch.load(folder / "model_final.pth", weights_only=True), losses


@pytest.mark.slow
def test_rank_0_draws_when_all_ranks_fail(make_args, torchrun, tmp_path):
    """Both raise the error of a loss that is nan; torchrun ends one when the other has ended."""
    args = make_args("SOLVER.BASE_LR", "1e7", "SOLVER.CLIP_GRADIENTS.ENABLED", "False")
    command = (ROOT / "train_net.py", "--config-file", args.config_file)
    text = torchrun(*command, *args.opts, "SOLVER.WARMUP_ITERS", "0", ok=False)
    assert "FloatingPointError: Training stopped at iteration" in text
    assert len(re.findall("Wrote .*report.html", text)) == 1
    assert (tmp_path / "out" / "report.html").is_file()
