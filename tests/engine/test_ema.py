"""The average of weights: its arithmetic, and its use in training, evaluation and checkpoints."""

import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from fcos_d2.engine import Trainer, evaluate
from fcos_d2.engine.ema import ModelEma

EMA = ("MODEL_EMA.ENABLED", "True")


def make_model():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Linear(5, 2))
    return model.to(memory_format=torch.channels_last)


def change(model):
    """Move weights and statistics in place, as an iteration does."""
    with torch.no_grad():
        for x in model.state_dict().values():
            x.add_(torch.randn_like(x) if x.is_floating_point() else 1)


def test_two_updates_by_hand():
    """The decays are 1 / 10 and 2 / 11. Of the weights 0, 1, 1 the average is then 0; 0.9; and
    2 / 11 * 0.9 + 9 / 11 = (1.8 + 9) / 11 = 10.8 / 11."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    ema = ModelEma(model, decay=0.999)
    assert ema.weights()["weight"].item() == 0
    nn.init.ones_(model.weight)
    for expected in (0.9, 10.8 / 11):
        ema.update()
        assert ema.weights()["weight"].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("decay", [0.3, 0.999])
def test_40_updates_are_those_of_a_plain_loop_in_float64(decay):
    model = make_model()
    ema = ModelEma(model, decay)
    wanted = {k: x.double() for k, x in model.state_dict().items()}
    for t in range(40):
        change(model)
        ema.update()
        d = min(decay, (1 + t) / (10 + t))
        for key, x in model.state_dict().items():
            counter = "num_batches" in key
            wanted[key] = x.double() if counter else d * wanted[key] + (1 - d) * x.double()
    assert ema.num_updates == 40
    assert ema.weights()["1.num_batches_tracked"].item() == 40
    got = {k: x.double() for k, x in ema.weights().items()}
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_constant_weights_are_kept_to_the_last_bit(assert_equal):
    model = make_model()
    ema = ModelEma(model, decay=0.9)
    for _ in range(30):
        ema.update()
    assert_equal(ema.weights(), model.state_dict())


def test_applied_swaps_the_average_in_and_out_even_after_an_error(assert_equal):
    model = make_model()
    ema = ModelEma(model, decay=0.9)
    change(model)
    ema.update()
    own = {key: x.clone() for key, x in model.state_dict().items()}
    average = {key: x.clone() for key, x in ema.weights().items()}
    tensors = [x.data_ptr() for x in model.state_dict().values()]
    with pytest.raises(RuntimeError, match="inside"), ema.applied():
        assert_equal(model.state_dict(), average)
        raise RuntimeError("inside")
    assert_equal(model.state_dict(), own)
    assert_equal(ema.weights(), average)
    assert not torch.equal(own["0.weight"], average["0.weight"])
    # The optimizer, DDP and CUDA graphs refer to them.
    assert tensors == [x.data_ptr() for x in model.state_dict().values()]


def test_the_memory_format_is_kept():
    model = make_model()
    ema = ModelEma(model, decay=0.9)
    state = ema.state_dict()
    ema.load_state_dict({**state, "raw": {k: x.contiguous() for k, x in state["raw"].items()}})
    with ema.applied():
        ema.update()
    for weight in (model[0].weight, ema.weights()["0.weight"]):
        assert weight.is_contiguous(memory_format=torch.channels_last)
        assert not weight.is_contiguous()


class Toy(nn.Module):
    """Learns the mean colour of images; quick, with running statistics and a counter."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, inputs):
        x = torch.stack([item["image"].float().mean((1, 2)) / 255 for item in inputs])
        return {"loss_toy": (self.norm(self.linear(x)) - x.sum()).square().mean()}


class ToyTrainer(Trainer):
    """Trains it; an evaluation keeps the weights that it was given."""

    seen: list

    @classmethod
    def build_model(cls, cfg):
        torch.manual_seed(0)
        return Toy()

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        cls.seen.append({key: x.clone() for key, x in model.state_dict().items()})
        return {"bbox": {"AP": 1.0}}


@pytest.fixture
def make_trainer(make_args, prepare, monkeypatch):
    """Build a trainer of 4 iterations that saves every second: ``make_trainer(*opts)``."""
    monkeypatch.setattr(ToyTrainer, "seen", [], raising=False)

    def make(*opts, resume=False, output="out"):
        base = ("SOLVER.MAX_ITER", "4", "SOLVER.CHECKPOINT_PERIOD", "2", "SOLVER.WARMUP_ITERS", "0")
        trainer = ToyTrainer(prepare(make_args(*base, *opts, output=output)))
        trainer.resume_or_load(resume=resume)
        return trainer

    return make


def test_4_iterations_equal_2_and_a_resume(make_trainer, interrupt, load, assert_equal):
    """To the last bit: raw weights, averages, momentum."""
    whole = make_trainer(*EMA, output="whole")
    whole.train()
    interrupt(make_trainer(*EMA, output="parts"), iteration=2)
    parts = make_trainer(*EMA, output="parts", resume=True)
    assert parts.start_iter == parts.ema.num_updates == 2
    parts.train()
    one, other = load(whole.cfg, "model_final"), load(parts.cfg, "model_final")
    assert one["trainer"]["ema"]["num_updates"] == other["trainer"]["ema"]["num_updates"] == 4
    assert_equal(one["model"], other["model"])
    assert_equal(one["trainer"]["ema"]["raw"], other["trainer"]["ema"]["raw"])
    for state in (one, other):
        optimizer = state["trainer"]["_trainer"]["optimizer"]["state"]
        state["momentum"] = {k: x["momentum_buffer"] for k, x in optimizer.items()}
    assert_equal(one["momentum"], other["momentum"])


def test_checkpoints_hold_the_average_and_training_ignores_it(make_trainer, load, assert_equal):
    averaged, plain = make_trainer(*EMA, output="averaged"), make_trainer(output="plain")
    for trainer in (averaged, plain):
        trainer.train()
    state, plain_state = load(averaged.cfg, "model_final"), load(plain.cfg, "model_final")
    assert_equal(state["model"], averaged.ema.weights())
    assert_equal(state["trainer"]["ema"]["raw"], plain_state["model"])
    assert not torch.equal(state["model"]["linear.weight"], plain_state["model"]["linear.weight"])
    assert "ema" not in plain_state["trainer"]
    assert_equal(load(averaged.cfg, "model_best")["model"], state["model"])


def test_evaluations_see_the_average(make_trainer, load, assert_equal):
    """After 2 iterations and after the last one; training continues with the raw weights."""
    trainer = make_trainer(*EMA, "TEST.EVAL_PERIOD", "2")
    trainer.train()
    saved = [load(trainer.cfg, name) for name in ("model_0000001", "model_final")]
    assert len(trainer.seen) == 2
    for seen, state in zip(trainer.seen, saved, strict=True):
        assert_equal(seen, state["model"])
    assert_equal(trainer.model.state_dict(), saved[1]["trainer"]["ema"]["raw"])


def test_resume_without_averaging(make_trainer, interrupt, load, assert_equal, caplog):
    plain = make_trainer(output="plain")
    plain.train()
    interrupt(make_trainer(*EMA), iteration=2)
    resumed = make_trainer(resume=True)
    assert "continues from its raw weights" in caplog.text
    resumed.train()
    assert_equal(load(resumed.cfg, "model_final")["model"], load(plain.cfg, "model_final")["model"])


def test_resume_with_averaging_from_a_checkpoint_without(
    make_trainer, interrupt, load, assert_equal, caplog
):
    interrupt(make_trainer(), iteration=2)
    resumed = make_trainer(*EMA, resume=True)
    assert "saved without averaged weights" in caplog.text
    assert resumed.start_iter == 2 and resumed.ema.num_updates == 0
    assert_equal(resumed.ema.weights(), load(resumed.cfg, "model_0000001")["model"])
    resumed.train()
    assert resumed.ema.num_updates == 2


def test_fine_tuning_starts_the_average_from_the_loaded_weights(make_trainer, assert_equal):
    first = make_trainer(*EMA, output="first")
    first.train()
    weights = os.path.join(first.cfg.OUTPUT_DIR, "model_final.pth")
    second = make_trainer(*EMA, "MODEL.WEIGHTS", weights, output="second")
    assert second.start_iter == second.ema.num_updates == 0
    assert_equal(second.ema.weights(), first.ema.weights())
    assert_equal(second.model.state_dict(), first.ema.weights())


def test_evaluation_of_a_checkpoint_gives_the_detections_of_the_training(make_args, prepare):
    """FCOS itself, to the last digit, without any key of the average."""
    options = ("SOLVER.MAX_ITER", "1", "SOLVER.BASE_LR", "0.1", "TEST.BEST_METRIC", "")
    trainer = Trainer(prepare(make_args(*EMA, *options)))
    trainer.resume_or_load(resume=False)
    trainer.train()
    (file,) = Path(trainer.cfg.OUTPUT_DIR).glob("inference/*/*_results.json")
    trained = json.loads(file.read_text())
    weights = os.path.join(trainer.cfg.OUTPUT_DIR, "model_final.pth")
    evaluate(prepare(make_args("MODEL.WEIGHTS", weights, eval_only=True)))
    assert json.loads(file.read_text()) == trained
    assert len(trained) > 6
