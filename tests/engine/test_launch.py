"""Training in several processes: what is refused, and `train_net.py` under torchrun."""

import argparse
import json
import re
from pathlib import Path

import pytest
import torch
from detectron2.engine import default_argument_parser

from fcos_d2.engine import Trainer, launch, setup

ROOT = Path(__file__).resolve().parents[2]


def test_one_process_runs_here():
    seen = []
    launch(seen.append, default_argument_parser().parse_args(["--resume"]))
    (args,) = seen
    assert isinstance(args, argparse.Namespace) and args.resume


def refuse(args):
    """A main that must not be reached."""
    raise AssertionError(args)


def test_more_processes_than_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    args = default_argument_parser().parse_args(["--num-gpus", "2"])
    with pytest.raises(ValueError, match="--num-gpus 2 needs 2 CUDA devices.*has 0.*torchrun"):
        launch(refuse, args)


def test_torchrun_says_how_many_processes_there_are(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    args = default_argument_parser().parse_args(["--num-gpus", "2"])
    with pytest.raises(ValueError, match="Under torchrun leave --num-gpus"):
        launch(refuse, args)


def test_two_ranks_train_as_one_process_does(make_args, torchrun, tmp_path):
    """Four iterations and a resume to six: the weights of one process that took all six.

    With either number of ranks the batches hold the same images, all padded to one size, with the
    same augmentation. Each thing is said, written and drawn once.
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
    assert text.count("Rank of current process: 0. World size: 2") == 1
    assert text.count("Starting training from iteration 0") == 1
    assert text.count("detections.png") == 1
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
