"""The average of weights: its arithmetic, and what training, evaluation and checkpoints do."""

import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from fcos_d2.engine import Trainer, evaluate, load_cfg, prepare_datasets
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
    wanted = {k: x.double().flatten().tolist() for k, x in model.state_dict().items()}
    for t in range(40):
        change(model)
        ema.update()
        d = (1 + t) / (10 + t)
        d = decay if d > decay else d
        for key, x in model.state_dict().items():
            new = x.double().flatten().tolist()
            old = wanted[key] if "num_batches" not in key else new
            wanted[key] = [d * a + (1 - d) * b for a, b in zip(old, new, strict=True)]
    assert ema.num_updates == 40
    assert ema.weights().keys() == wanted.keys()
    for key, x in ema.weights().items():
        torch.testing.assert_close(
            x.double().flatten(), torch.tensor(wanted[key]).double(), rtol=1e-5, atol=1e-5, msg=key
        )
    assert ema.weights()["1.num_batches_tracked"].item() == 40


def test_weights_that_do_not_move_stay_to_the_last_bit():
    model = make_model()
    ema = ModelEma(model, decay=0.9)
    for _ in range(30):
        ema.update()
    for key, x in model.state_dict().items():
        assert torch.equal(ema.weights()[key], x), key


def test_applied_gives_the_average_and_takes_it_back_even_after_an_error():
    model = make_model()
    ema = ModelEma(model, decay=0.9)
    change(model)
    ema.update()
    own = {key: x.clone() for key, x in model.state_dict().items()}
    average = {key: x.clone() for key, x in ema.weights().items()}
    tensors = [x.data_ptr() for x in model.state_dict().values()]
    with pytest.raises(RuntimeError, match="inside"), ema.applied():
        assert_same(model.state_dict(), average)
        raise RuntimeError("inside")
    assert_same(model.state_dict(), own)
    assert_same(ema.weights(), average)
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


def prepare(args):
    """As setup() does, which takes its time to look at the machine."""
    cfg = load_cfg(args.config_file, args.opts)
    prepare_datasets(cfg, args.eval_only)
    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    return cfg


@pytest.fixture
def make_trainer(make_args, monkeypatch):
    """Build a trainer of 4 iterations that saves every second: ``make_trainer(*opts)``."""
    monkeypatch.setattr(ToyTrainer, "seen", [], raising=False)

    def make(*opts, resume=False, output="out"):
        base = ("SOLVER.MAX_ITER", "4", "SOLVER.CHECKPOINT_PERIOD", "2", "SOLVER.WARMUP_ITERS", "0")
        trainer = ToyTrainer(prepare(make_args(*base, *opts, output=output)))
        trainer.resume_or_load(resume=resume)
        return trainer

    return make


def interrupt(trainer, iteration):
    """Train up to an iteration, where somebody presses Ctrl-C."""
    step = trainer.run_step

    def run_step():
        if trainer.iter == iteration:
            raise KeyboardInterrupt
        step()

    trainer.run_step = run_step
    with pytest.raises(KeyboardInterrupt):
        trainer.train()


def load(trainer, name="model_final.pth"):
    return torch.load(os.path.join(trainer.cfg.OUTPUT_DIR, name), weights_only=True)


def assert_same(one, other):
    assert one.keys() == other.keys()
    for key, x in one.items():
        assert torch.equal(x, other[key]), key


def test_4_iterations_equal_2_and_a_resume(make_trainer):
    """To the last bit: raw weights, averages, momentum."""
    whole = make_trainer(*EMA, output="whole")
    whole.train()
    interrupt(make_trainer(*EMA, output="parts"), iteration=2)
    parts = make_trainer(*EMA, output="parts", resume=True)
    assert parts.start_iter == parts.ema.num_updates == 2
    parts.train()
    one, other = load(whole), load(parts)
    assert one["trainer"]["ema"]["num_updates"] == other["trainer"]["ema"]["num_updates"] == 4
    assert_same(one["model"], other["model"])
    assert_same(one["trainer"]["ema"]["raw"], other["trainer"]["ema"]["raw"])
    for state in (one, other):
        optimizer = state["trainer"]["_trainer"]["optimizer"]["state"]
        state["momentum"] = {k: x["momentum_buffer"] for k, x in optimizer.items()}
    assert_same(one["momentum"], other["momentum"])


def test_a_checkpoint_holds_the_average_and_the_training_is_as_without_it(make_trainer):
    averaged, plain = make_trainer(*EMA, output="averaged"), make_trainer(output="plain")
    for trainer in (averaged, plain):
        trainer.train()
    state, plain_state = load(averaged), load(plain)
    assert_same(state["model"], averaged.ema.weights())
    assert_same(state["trainer"]["ema"]["raw"], plain_state["model"])
    assert not torch.equal(state["model"]["linear.weight"], plain_state["model"]["linear.weight"])
    assert "ema" not in plain_state["trainer"]
    assert_same(load(averaged, "model_best.pth")["model"], state["model"])


def test_evaluations_see_the_average(make_trainer):
    """After 2 iterations and after the last one; training goes on with the raw weights."""
    trainer = make_trainer(*EMA, "TEST.EVAL_PERIOD", "2")
    trainer.train()
    saved = [load(trainer, name) for name in ("model_0000001.pth", "model_final.pth")]
    assert len(trainer.seen) == 2
    for seen, state in zip(trainer.seen, saved, strict=True):
        assert_same(seen, state["model"])
    assert_same(trainer.model.state_dict(), saved[1]["trainer"]["ema"]["raw"])


def test_switched_off_a_resumed_run_goes_on_without_an_average(make_trainer, caplog):
    plain = make_trainer(output="plain")
    plain.train()
    interrupt(make_trainer(*EMA), iteration=2)
    resumed = make_trainer(resume=True)
    assert "goes on from the weights beside them" in caplog.text
    resumed.train()
    assert_same(load(resumed)["model"], load(plain)["model"])


def test_switched_on_a_resumed_run_starts_an_average(make_trainer, caplog):
    interrupt(make_trainer(), iteration=2)
    resumed = make_trainer(*EMA, resume=True)
    assert "saved without an average" in caplog.text
    assert resumed.start_iter == 2 and resumed.ema.num_updates == 0
    assert_same(resumed.ema.weights(), load(resumed, "model_0000001.pth")["model"])
    resumed.train()
    assert resumed.ema.num_updates == 2


def test_fine_tuning_starts_the_average_from_the_weights_that_are_loaded(make_trainer):
    first = make_trainer(*EMA, output="first")
    first.train()
    weights = os.path.join(first.cfg.OUTPUT_DIR, "model_final.pth")
    second = make_trainer(*EMA, "MODEL.WEIGHTS", weights, output="second")
    assert second.start_iter == second.ema.num_updates == 0
    assert_same(second.ema.weights(), first.ema.weights())
    assert_same(second.model.state_dict(), first.ema.weights())


def test_evaluation_of_a_checkpoint_gives_the_detections_of_the_training(make_args):
    """FCOS itself, to the last digit, with no key of the average."""
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
