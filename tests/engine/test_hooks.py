"""The best checkpoint and early stopping, with evaluations that follow a script."""

import json
import logging
import math
import os

import pytest
import torch
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.structures import Boxes, Instances
from torch import nn

from fcos_d2.data import class_names, load_records, register_source
from fcos_d2.engine import Trainer
from fcos_d2.engine.hooks import best_metric, check_hooks
from fcos_d2.evaluation import DetectionEvaluator, ProposalEvaluator

NAN = float("nan")


class Counter(nn.Module):
    """Its weight falls by the learning rate, 1, in each iteration."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, inputs):
        return {"loss": self.weight.sum()}


class ScriptedTrainer(Trainer):
    """Evaluations give the values of a script, by the number of iterations done."""

    script: dict
    evaluated: list

    @classmethod
    def build_model(cls, cfg):
        return Counter()

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        done = -round(model.weight.item())
        cls.evaluated.append(done)
        return {"bbox": {"AP": cls.script[done], "AP50": 50.0}}


@pytest.fixture
def make_trainer(make_args, prepare, monkeypatch):
    """Build a trainer: ``make_trainer(values of the evaluations, *opts, period=2)``."""

    def make(values, *opts, period=2, resume=False):
        script = {period * (k + 1): x for k, x in enumerate(values)}
        monkeypatch.setattr(ScriptedTrainer, "script", script, raising=False)
        monkeypatch.setattr(ScriptedTrainer, "evaluated", [], raising=False)
        base = {
            "SOLVER.MAX_ITER": str(period * len(values)),
            "SOLVER.CHECKPOINT_PERIOD": "2",
            "TEST.EVAL_PERIOD": str(period),
            "SOLVER.BASE_LR": "1.0",
            "SOLVER.MOMENTUM": "0.0",
            "SOLVER.WEIGHT_DECAY": "0.0",
            "SOLVER.WARMUP_ITERS": "0",
            "SOLVER.LR_SCHEDULER_NAME": "WarmupMultiStepLR",
            "SOLVER.STEPS": "()",
        }
        options = [x for pair in base.items() for x in pair]
        trainer = ScriptedTrainer(prepare(make_args(*options, *opts)))
        trainer.resume_or_load(resume=resume)
        return trainer

    return make


def patience(number):
    return ("TEST.EARLY_STOP_PATIENCE", str(number))


def read(trainer, name):
    with open(os.path.join(trainer.cfg.OUTPUT_DIR, name)) as file:
        return file.read()


def evaluations(trainer):
    """Lines of metrics.json with results."""
    lines = [json.loads(line) for line in read(trainer, "metrics.json").splitlines()]
    return [line for line in lines if "bbox/AP" in line]


def best_exists(trainer):
    return os.path.exists(os.path.join(trainer.cfg.OUTPUT_DIR, "model_best.pth"))


def test_the_best_checkpoint_is_kept(make_trainer, load):
    """Of evaluations after 2, 4, 6, 8 iterations the second is the best: iteration 3, from 0."""
    trainer = make_trainer([10.0, 30.0, NAN, 30.0])
    trainer.train()
    best = load(trainer.cfg, "model_best")
    assert best.keys() == {"model", "class_names", "cfg", "iteration", "best"}
    assert best["iteration"] == 3
    assert best["best"] == {"metric": "bbox/AP", "value": 30.0}
    assert best["model"]["weight"].item() == -4
    assert best["class_names"] == ["ball", "box"]
    assert best["cfg"]["MODEL.PIXEL_STD"] == trainer.cfg.MODEL.PIXEL_STD
    assert read(trainer, "last_checkpoint") == "model_final.pth"


def test_the_last_checkpoint_is_not_the_best_one(make_trainer, interrupt, load):
    """Only model_best.pth is written after the evaluation at 3 iterations."""
    trainer = make_trainer([10.0, 20.0], period=3)
    interrupt(trainer, iteration=3)
    assert load(trainer.cfg, "model_best")["iteration"] == 2
    assert read(trainer, "last_checkpoint") == "model_0000001.pth"
    assert make_trainer([10.0, 20.0], period=3, resume=True).start_iter == 2


def test_the_evaluation_after_the_last_iteration_counts(make_trainer, load):
    """For the file, and for a run that goes on from there."""
    make_trainer([10.0, 20.0]).train()
    trainer = make_trainer([10.0, 20.0, 15.0], resume=True)
    assert trainer.start_iter == 4
    assert load(trainer.cfg, "model_best")["best"]["value"] == 20
    trainer.train()
    assert trainer.evaluated == [6]
    assert load(trainer.cfg, "model_best")["best"]["value"] == 20


@pytest.mark.parametrize(
    "values, metric, best",
    [([NAN, NAN], "bbox/AP", None), ([0.0, 0.0], "bbox/AP", 1), ([1.0], "", None)],
    ids=["nan_is_never_the_best", "0_is_the_first_best", "no_metric"],
)
def test_whether_there_is_a_best(make_trainer, load, values, metric, best):
    trainer = make_trainer(values, "TEST.BEST_METRIC", metric)
    trainer.train()
    assert best_exists(trainer) == (best is not None)
    assert ("bbox/AP_best" in read(trainer, "metrics.json")) == (best is not None)
    assert best is None or load(trainer.cfg, "model_best")["iteration"] == best


def test_the_best_value_is_in_metrics_json(make_trainer):
    trainer = make_trainer([10.0, 30.0, 20.0])
    trainer.train()
    values = {x["iteration"]: (x["bbox/AP"], x["bbox/AP_best"]) for x in evaluations(trainer)}
    # Detectron2 puts the last evaluation one iteration further.
    assert values == {1: (10, 10), 3: (30, 30), 6: (20, 30)}


# Improvements to 10 and 20, then three evaluations without one: 15, 20 again and nan.
SCRIPT = [10.0, 20.0, 15.0, 20.0, NAN, 40.0, 50.0]


def test_a_run_stops_when_patience_is_exhausted(make_trainer, caplog, load):
    caplog.set_level(logging.INFO)
    trainer = make_trainer(SCRIPT, *patience(3))
    results = trainer.train()
    assert trainer.evaluated == [2, 4, 6, 8, 10]
    assert trainer.model.weight.item() == -10
    final = load(trainer.cfg, "model_final")
    assert final["iteration"] == 9 and final["model"]["weight"].item() == -10
    assert read(trainer, "last_checkpoint") == "model_final.pth"
    assert load(trainer.cfg, "model_best")["model"]["weight"].item() == -4
    assert math.isnan(results["bbox"]["AP"])
    assert "Stopped early after 10 iterations: 3 evaluations without a better bbox/AP than 20" in (
        caplog.text
    )
    assert "Exception" not in caplog.text
    assert [x["iteration"] for x in evaluations(trainer)] == [1, 3, 5, 7, 9]
    assert all("total_loss" in x for x in evaluations(trainer))


def test_one_more_would_not_have_stopped_it(make_trainer):
    trainer = make_trainer(SCRIPT, *patience(4))
    assert trainer.train()["bbox"]["AP"] == 50
    assert trainer.evaluated == [2, 4, 6, 8, 10, 12, 14]


@pytest.mark.parametrize("last", [6, 7, 8, 9])
def test_a_resumed_run_stops_where_the_whole_one_does(make_trainer, last, interrupt, load):
    """Interrupted after whatever iteration; checkpoints are written in those of evaluations."""
    interrupt(make_trainer(SCRIPT, *patience(3)), iteration=last)
    trainer = make_trainer(SCRIPT, *patience(3), resume=True)
    assert trainer.start_iter == last // 2 * 2
    trainer.train()
    assert trainer.evaluated == [x for x in (8, 10) if x > last]
    assert load(trainer.cfg, "model_final")["iteration"] == 9
    assert load(trainer.cfg, "model_best")["iteration"] == 3


def test_a_run_that_has_stopped_goes_on_only_with_more_patience(make_trainer, caplog, load):
    caplog.set_level(logging.INFO)
    make_trainer(SCRIPT, *patience(3)).train()
    again = make_trainer(SCRIPT, *patience(3), resume=True)
    caplog.clear()
    assert again.train() is None
    assert again.evaluated == [] and again.model.weight.item() == -10
    assert "PATIENCE is 3: to continue, --resume with a larger one, or with 0." in caplog.text
    more = make_trainer(SCRIPT, *patience(4), resume=True)
    more.train()
    assert more.evaluated == [12, 14]
    assert load(more.cfg, "model_best")["best"]["value"] == 50


def test_another_metric_is_compared_anew(make_trainer, caplog, interrupt, load):
    interrupt(make_trainer(SCRIPT, *patience(3)), iteration=9)
    options = (*patience(3), "TEST.BEST_METRIC", "bbox/AP50")
    trainer = make_trainer(SCRIPT, *options, resume=True)
    assert "was bbox/AP and is bbox/AP50 now" in caplog.text
    trainer.train()
    assert trainer.evaluated == [10, 12, 14]
    assert load(trainer.cfg, "model_best")["iteration"] == 9


def test_a_rank_without_results_follows_the_main_process(make_trainer, monkeypatch):
    trainer = make_trainer(SCRIPT, *patience(3))
    told = iter(SCRIPT)
    monkeypatch.setattr(ScriptedTrainer, "test", classmethod(lambda *_: {}))
    monkeypatch.setattr("detectron2.utils.comm.all_gather", lambda own: [next(told), own])
    trainer.train()
    assert trainer.model.weight.item() == -10


def test_results_without_the_metric_lose_no_training(make_trainer, monkeypatch, load):
    """Possible with a subclass's evaluator: those of this package are checked before training."""
    trainer = make_trainer([1.0, 1.0], "TEST.BEST_METRIC", "voc/AP50_area", *patience(1), period=3)
    with pytest.raises(ValueError, match=r"voc/AP50_area is not among .*\(bbox/AP, bbox/AP50\)"):
        trainer.train()
    assert read(trainer, "last_checkpoint") == "model_0000002.pth"
    assert load(trainer.cfg, "model_0000002")["model"]["weight"].item() == -3


def test_results_without_the_metric_keep_no_best(make_trainer, caplog):
    """Without early stopping only the file depends on the metric."""
    trainer = make_trainer([1.0, 1.0], "TEST.BEST_METRIC", "segm/AP")
    with caplog.at_level(logging.ERROR):
        trainer.train()
    assert trainer.model.weight.item() == -4
    assert caplog.text.count("No best checkpoint is saved: TEST.BEST_METRIC segm/AP is not") == 2
    assert not best_exists(trainer)


@pytest.fixture
def data_cfg(tiny_cfg, voc_folder):
    """A config with one test set."""
    name = f"voc:{voc_folder}:train"
    register_source(name)
    tiny_cfg.DATASETS.TEST = (name,)
    tiny_cfg.TEST.EVAL_PERIOD = 10
    return tiny_cfg


@pytest.mark.parametrize(
    "options, message",
    [
        (["MODEL_EMA.DECAY", 1.0], "MODEL_EMA.DECAY is 1.0: set it to a number between 0 and 1"),
        (["MODEL_EMA.DECAY", 0.0], "MODEL_EMA.DECAY is 0.0"),
        (["MODEL_EMA.DECAY", NAN], "MODEL_EMA.DECAY is nan"),
        (["TEST.PRECISE_BN.ENABLED", True], "PRECISE_BN.ENABLED .* set one of the two to False"),
        ([*patience(-1)], "EARLY_STOP_PATIENCE is -1: set it to a number of evaluations, or to 0"),
        ([*patience(2), "TEST.EVAL_PERIOD", 0], "is 2, but TEST.EVAL_PERIOD is not set"),
        ([*patience(2), "DATASETS.TEST", ()], "is 2, but DATASETS.TEST is not set"),
        ([*patience(2), "TEST.BEST_METRIC", ""], "is 2, but TEST.BEST_METRIC is not set"),
        (["TEST.BEST_METRIC", "AP"], r"BEST_METRIC AP is not among .* \(bbox/AP, bbox/AP50, .*''"),
        (["TEST.BEST_METRIC", "bbox/AP-cat"], "bbox/AP-cat is not among"),
    ],
)
def test_invalid_values(data_cfg, options, message):
    data_cfg.merge_from_list(["MODEL_EMA.ENABLED", True, *options])
    with pytest.raises(ValueError, match=message):
        check_hooks(data_cfg)


def test_valid_values(data_cfg):
    check_hooks(data_cfg)
    data_cfg.TEST.EARLY_STOP_PATIENCE = 1
    data_cfg.TEST.BEST_METRIC = "voc/AP50_area-ball"
    check_hooks(data_cfg)
    data_cfg.TEST.BEST_METRIC = "segm/AP"  # from a subclass's evaluator
    check_hooks(data_cfg)
    data_cfg.MODEL_EMA.DECAY = -1.0  # not used
    check_hooks(data_cfg)


def test_the_trainer_checks_them(make_args, prepare):
    with pytest.raises(ValueError, match="TEST.BEST_METRIC bbox/ap is not among"):
        Trainer(prepare(make_args("TEST.BEST_METRIC", "bbox/ap")))


def accepts(cfg, metric):
    cfg.TEST.BEST_METRIC = metric
    try:
        return best_metric(cfg) == metric
    except ValueError:
        return False


def test_every_result_of_the_evaluators_can_be_named(data_cfg, tmp_path):
    """And what Trainer.build_evaluator gives is all that can be."""
    (name,) = data_cfg.DATASETS.TEST
    records = load_records(name)
    results = DetectionEvaluator(name, records, class_names(name)).evaluate()
    detection = list(flatten_results_dict(results))
    evaluator = ProposalEvaluator(name, records, output_dir=tmp_path / "proposals")
    evaluator.reset()
    proposals = Instances((64, 80), proposal_boxes=Boxes(torch.tensor([[0.0, 0, 9, 9]])))
    proposals.objectness_logits = torch.ones(1)
    evaluator.process(records[:1], [{"proposals": proposals}])
    proposal = list(flatten_results_dict(evaluator.evaluate()))
    assert len(detection) == 20 and len(proposal) == 8
    assert all(accepts(data_cfg, metric) for metric in detection)
    assert not any(accepts(data_cfg, metric) for metric in proposal)
    data_cfg.MODEL.META_ARCHITECTURE = "ProposalNetwork"
    assert all(accepts(data_cfg, metric) for metric in proposal)
    assert not any(accepts(data_cfg, metric) for metric in detection)
    data_cfg.TEST.BEST_METRIC = "bbox/AP"  # the default
    assert best_metric(data_cfg) == "box_proposals/AR@1000"


def test_several_test_sets(data_cfg, write_voc_folder, tmp_path):
    """The first one is meant, unless the name says which."""
    first = data_cfg.DATASETS.TEST[0]
    second = f"voc:{write_voc_folder(tmp_path / 'second')}:train"
    register_source(second)
    data_cfg.DATASETS.TEST = (first, second)
    assert best_metric(data_cfg) == f"{first}/bbox/AP"
    assert accepts(data_cfg, f"{second}/voc/AP50_area")
    assert not accepts(data_cfg, "other/bbox/AP")
    assert accepts(data_cfg, f"{second}/segm/AP")
    data_cfg.TEST.BEST_METRIC = "segm/AP"
    assert best_metric(data_cfg) == f"{first}/segm/AP"
    data_cfg.DATASETS.TEST = ()
    assert best_metric(data_cfg) == ""
