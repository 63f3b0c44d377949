"""Training, resuming and evaluating on a tiny data set."""

import json
import math
import os
from pathlib import Path

import pytest
import torch

from fcos_d2.engine import Trainer, evaluate, setup


def train(args):
    cfg = setup(args)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    trainer.train()
    return cfg


def read_metrics(cfg):
    with open(os.path.join(cfg.OUTPUT_DIR, "metrics.json")) as file:
        return [json.loads(line) for line in file]


def last_metrics(cfg):
    """Everything that was written after the last step: the losses, then the evaluation."""
    lines = read_metrics(cfg)
    first = max(k for k, line in enumerate(lines) if "total_loss" in line)
    return {key: value for line in lines[first:] for key, value in line.items()}


TWENTY = ("SOLVER.MAX_ITER", "20", "SOLVER.CHECKPOINT_PERIOD", "10", "SOLVER.WARMUP_ITERS", "4")


@pytest.mark.slow
def test_20_iterations_equal_10_and_a_resume(make_args, interrupt, load):
    """The whole run stops after 10 of 20 as one that was killed, and goes on from there."""
    whole = train(make_args(*TWENTY, output="whole"))

    args = make_args(*TWENTY, output="parts")
    cfg = setup(args)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    interrupt(trainer, iteration=10)
    parts = train(make_args(*TWENTY, output="parts", resume=True))

    one, other = load(whole, "model_final"), load(parts, "model_final")
    assert one["iteration"] == other["iteration"] == 19
    for key, value in one["model"].items():
        torch.testing.assert_close(other["model"][key], value, rtol=1e-5, atol=1e-6, msg=key)
    last, last_resumed = last_metrics(whole), last_metrics(parts)
    compared = [k for k in last if "time" not in k and "eta" not in k]
    assert {"loss_cls", "loss_box", "loss_ctr", "lr", "bbox/AP", "fcos/num_pos"} <= set(compared)
    for key in compared:
        one, other = last[key], last_resumed[key]
        assert math.isclose(one, other, rel_tol=1e-4, abs_tol=1e-6) or one != one, key


def test_ranks_that_found_different_checkpoints(make_args, monkeypatch):
    """As on a second machine that does not have the folder of the first."""
    trainer = Trainer(setup(make_args()))
    monkeypatch.setattr("detectron2.utils.comm.all_gather", lambda start: [4, start])
    with pytest.raises(RuntimeError, match=r"iterations \[4, 0\]. All machines need"):
        trainer.resume_or_load(resume=True)


@pytest.mark.slow
@pytest.mark.parametrize("half", ["False", "True"], ids=["float32", "bfloat16"])
def test_two_seeded_runs_are_the_same(make_args, half, load):
    """To the last bit: weights, metrics and detections."""
    options = ("SOLVER.MAX_ITER", "3", "SOLVER.AMP.ENABLED", half)
    one, other = (train(make_args(*options, output=name)) for name in ("one", "other"))
    for key, value in load(one, "model_final")["model"].items():
        assert torch.equal(load(other, "model_final")["model"][key], value), key
    last, last_again = last_metrics(one), last_metrics(other)
    compared = [k for k in last if "time" not in k and "eta" not in k]
    assert {"total_loss", "loss_cls", "fcos/num_pos", "bbox/AP"} <= set(compared)
    for key in compared:
        assert last[key] == last_again[key] or last[key] != last[key], key


@pytest.mark.slow
def test_evaluation_gives_the_table_of_the_training(make_args):
    """`--eval-only`, from the file and from the folder's last checkpoint: the same numbers."""
    cfg = train(make_args("SOLVER.MAX_ITER", "3"))
    trained = last_metrics(cfg)
    weights = os.path.join(cfg.OUTPUT_DIR, "model_final.pth")
    alone = evaluate(setup(make_args("MODEL.WEIGHTS", weights, eval_only=True)))
    resumed = evaluate(setup(make_args(eval_only=True, resume=True)), resume=True)
    for task, metrics in alone.items():
        for name, value in metrics.items():
            assert value == resumed[task][name] or value != value
            assert value == trained[f"{task}/{name}"] or value != value
    assert {"AP", "AP50", "AP75", "AR100"} <= set(alone["bbox"])
    assert {"AP50_11point", "AP50_area"} <= set(alone["voc"])


def read_model(cfg):
    """What evaluation.json says was evaluated."""
    (path,) = Path(cfg.OUTPUT_DIR).glob("inference/*/evaluation.json")
    return json.loads(path.read_text())["model"]


@pytest.mark.slow
@pytest.mark.parametrize("ema", [False, True])
def test_the_tables_say_what_was_evaluated(make_args, ema):
    average = ("MODEL_EMA.ENABLED", str(ema))
    cfg = train(make_args("SOLVER.MAX_ITER", "3", *average))
    trained = {"weights": None, "iteration": 2, "ema": ema, "tta": False, "optimize": "none"}
    trained["optimize"] = "none"
    assert read_model(cfg) == trained

    final, best = (os.path.join(cfg.OUTPUT_DIR, f"model_{x}.pth") for x in ("final", "best"))
    faster = ("MODEL.WEIGHTS", final, "TEST.OPTIMIZE", "bfloat16")
    evaluate(setup(make_args(*faster, eval_only=True)))
    assert read_model(cfg) == {**trained, "weights": final, "optimize": "bfloat16"}
    views = ("TEST.AUG.ENABLED", "True", "TEST.AUG.MIN_SIZES", "(64,)")
    evaluate(setup(make_args(*views, eval_only=True, resume=True)), resume=True)
    assert read_model(cfg) == {**trained, "weights": final, "tta": True}
    # It holds weights alone, which don't tell whether they are an average.
    evaluate(setup(make_args("MODEL.WEIGHTS", best, eval_only=True)))
    assert read_model(cfg) == {**trained, "weights": best, "ema": None}


@pytest.mark.slow
def test_an_evaluation_is_written_before_later_iterations(make_args):
    """Detectron2 would write those after 6 and 12 iterations with the losses of the 20th."""
    cfg = train(make_args("SOLVER.MAX_ITER", "21", "TEST.EVAL_PERIOD", "6"))
    lines = read_metrics(cfg)
    iterations = [line["iteration"] for line in lines]
    assert iterations == sorted(iterations)
    assert [x["iteration"] for x in lines if "bbox/AP" in x] == [5, 11, 17, 21]
    assert [x["iteration"] for x in lines if "total_loss" in x] == [5, 11, 17, 19, 20]


def test_evaluation_of_untrained_weights_is_refused(make_args):
    with pytest.raises(ValueError, match="MODEL.WEIGHTS is empty"):
        evaluate(setup(make_args(eval_only=True)))


def test_what_a_run_leaves_behind(make_args, load):
    cfg = train(make_args("SOLVER.MAX_ITER", "2"))
    names = set(os.listdir(cfg.OUTPUT_DIR))
    assert {"config.yaml", "log.txt", "metrics.json", "model_final.pth", "inference"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert not any(name.startswith(".") for name in names)  # files that are being written
    assert load(cfg, "model_final")["class_names"] == ["ball", "box"]


@pytest.mark.slow
def test_half_precision_is_what_the_config_says(make_args, load):
    """Other losses than in float32, and a checkpoint that a run in float32 goes on from."""
    options = ("SOLVER.MAX_ITER", "2")
    full = train(make_args(*options, output="full"))
    half = train(make_args(*options, "SOLVER.AMP.ENABLED", "True", output="half"))
    one, other = last_metrics(full)["total_loss"], last_metrics(half)["total_loss"]
    assert one != other and one == pytest.approx(other, rel=0.02)
    resumed = train(make_args("SOLVER.MAX_ITER", "3", output="half", resume=True))
    assert load(resumed, "model_final")["iteration"] == 2


@pytest.mark.slow
def test_a_few_iterations_learn(make_args):
    cfg = train(make_args("SOLVER.MAX_ITER", "40", "SOLVER.WARMUP_ITERS", "5"))
    first, last = read_metrics(cfg)[0], last_metrics(cfg)
    assert last["total_loss"] < first["total_loss"]
