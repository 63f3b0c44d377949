"""Keep the best checkpoint of a run, and stop a run that gets no better."""

import logging
from collections.abc import Mapping
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm

from ..checkpoint import FCOSCheckpointer
from ..data import class_names
from ..evaluation.coco_evaluation import COCO_ROWS

BEST_NAME = "model_best"
FINAL_NAME = "model_final"  # as Detectron2's PeriodicCheckpointer has it

_TABLES = ("bbox", "voc", "box_proposals")  # of this package's evaluators

logger = logging.getLogger(__name__)


class EarlyStop(BaseException):
    """Leaves Detectron2's training loop; says why.

    Not an ``Exception``, as ``KeyboardInterrupt`` is none: the loop would log it as a failure.
    """


class BestCheckpoint(HookBase):
    """Keep the weights of the best evaluation as ``model_best.pth``, and stop a run early.

    :meth:`judge` is called with the results of each evaluation. The run stops before the iteration
    after the evaluation at which patience is used up, when all hooks are done with the one before;
    so does a run that is resumed from there with no more patience than that.

    Args:
        checkpointer: of the run.
        metric: what to judge by, the more the better; named as in metrics.json.
        patience: evaluations in a row without a better value before the run stops; 0: it does not.
    """

    def __init__(self, checkpointer: FCOSCheckpointer, metric: str, patience: int = 0):
        self._checkpointer = checkpointer
        self._metric = metric
        self._patience = patience
        self._best = float("-inf")
        self._iteration = -1  # of the best, counted from 0 as in the names of checkpoints
        self._num_worse = 0  # evaluations since

    def judge(self, results: Mapping[str, Any]) -> None:
        """Compare an evaluation with the best one so far; called on all ranks.

        nan is never better. A checkpoint of the same iteration is written again, so that a run
        which is resumed from it knows of this evaluation.

        Args:
            results: nested dict of numbers; the main process's are looked at.

        Raises:
            ValueError: the metric is not among the results, and early stopping needs it; the
                training up to here is saved. Without early stopping that is logged as an error.
        """
        results = flatten_results_dict(results)
        # The main process alone has results, and all have to stop at the same iteration.
        value = comm.all_gather(results.get(self._metric))[0]
        iteration = min(self.trainer.iter, self.trainer.max_iter - 1)
        if value is None:
            message = _unknown_metric(self._metric, results)
            if not self._patience:
                logger.error("No best checkpoint is kept: %s", message)
                return
            if self._checkpointer.last_iteration != iteration:
                self._checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
            raise ValueError(message)
        if value > self._best:
            self._best, self._iteration, self._num_worse = float(value), iteration, 0
            best = {"metric": self._metric, "value": self._best}
            self._checkpointer.save_weights(BEST_NAME, iteration=iteration, best=best)
            logger.info("%s %.4f is the best so far: kept as %s.pth", *best.values(), BEST_NAME)
        else:
            self._num_worse += 1
            logger.info("%s %.4f; %s", self._metric, value, self._standing())
        if self._iteration >= 0:
            self.trainer.storage.put_scalar(
                f"{self._metric}_best", self._best, smoothing_hint=False
            )
        if self._is_used_up():
            self._checkpointer.save(FINAL_NAME, iteration=iteration)
        elif self._checkpointer.last_iteration == iteration:
            self._checkpointer.save_again()

    def before_step(self) -> None:
        """Stop the run if it is time.

        Raises:
            EarlyStop: it is.
        """
        if self._is_used_up():
            raise EarlyStop(
                f"Stopped early, {self.trainer.iter} iterations done: {self._standing()}. "
                f"TEST.EARLY_STOP_PATIENCE is {self._patience}: to train on, --resume with a "
                "larger one, or with 0."
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the best value, its iteration and how many evaluations were no better since."""
        return {
            "metric": self._metric,
            "value": self._best,
            "iteration": self._iteration,
            "num_worse": self._num_worse,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state_dict` gave; values of another metric are forgotten."""
        if state["metric"] != self._metric:
            logger.warning(
                "TEST.BEST_METRIC was %s and is %s now: the best is looked for anew.",
                state["metric"],
                self._metric,
            )
            return
        self._best, self._iteration = state["value"], state["iteration"]
        self._num_worse = state["num_worse"]

    def _is_used_up(self) -> bool:
        return 0 < self._patience <= self._num_worse

    def _standing(self) -> str:
        times = f"{self._num_worse} evaluation{'s' if self._num_worse > 1 else ''}"
        if self._iteration < 0:
            return f"{times} without a value of {self._metric}"
        return (
            f"{times} without a better {self._metric} than {self._best:.4f} of iteration "
            f"{self._iteration} ({BEST_NAME}.pth)"
        )


def check_hooks(cfg: CfgNode) -> None:
    """Check MODEL_EMA.*, TEST.BEST_METRIC and TEST.EARLY_STOP_PATIENCE.

    Raises:
        ValueError: a value without a meaning, with the key to set.
    """
    ema, test = cfg.MODEL_EMA, cfg.TEST
    if ema.ENABLED and not 0 < ema.DECAY < 1:
        raise ValueError(
            f"MODEL_EMA.DECAY is {ema.DECAY}: set it to a number between 0 and 1, such as 0.999, "
            "or MODEL_EMA.ENABLED to False."
        )
    if ema.ENABLED and test.PRECISE_BN.ENABLED:
        raise ValueError(
            "TEST.PRECISE_BN.ENABLED measures statistics of weights that are not averaged, and "
            "MODEL_EMA.ENABLED evaluates averaged ones: set one of the two to False."
        )
    patience = test.EARLY_STOP_PATIENCE
    if patience < 0:
        raise ValueError(
            f"TEST.EARLY_STOP_PATIENCE is {patience}: set it to a number of evaluations, or to 0 "
            "to train up to SOLVER.MAX_ITER."
        )
    needed = {
        "TEST.EVAL_PERIOD": test.EVAL_PERIOD > 0,
        "DATASETS.TEST": len(cfg.DATASETS.TEST) > 0,
        "TEST.BEST_METRIC": test.BEST_METRIC != "",
    }
    missing = [key for key, there in needed.items() if not there]
    if patience and missing:
        raise ValueError(
            f"TEST.EARLY_STOP_PATIENCE is {patience}, but {missing[0]} is not set, so there is "
            f"nothing to stop by: set {missing[0]}, or TEST.EARLY_STOP_PATIENCE to 0."
        )
    best_metric(cfg)


def best_metric(cfg: CfgNode) -> str:
    """Return the full name of TEST.BEST_METRIC, as in metrics.json; "" if none is to be kept.

    With several test sets it is that of the first, unless the name begins with one of them. Of a
    ``ProposalNetwork``, which detects nothing, bbox/AP stands for the recall of 1000 proposals.
    A table that ``Trainer`` does not make, as in segm/AP, may come from a subclass's evaluator.

    Raises:
        ValueError: it is in a table of ``Trainer``'s evaluators, or in none, and is not there.
    """
    metric, tests = cfg.TEST.BEST_METRIC, list(dict.fromkeys(cfg.DATASETS.TEST))
    if not metric or not tests:
        return ""
    names = _metric_names(cfg)
    if metric == "bbox/AP" and metric not in names:
        metric = "box_proposals/AR@1000"
    if len(tests) == 1:
        full_names = names
    else:
        full_names = [f"{test}/{name}" for test in tests for name in names]
        named = any(metric.startswith(f"{test}/") for test in tests)
        metric = metric if named else f"{tests[0]}/{metric}"
    if metric not in full_names and f"/{metric}".split("/")[-2] in ("", *_TABLES):
        raise ValueError(_unknown_metric(metric, full_names))
    return metric


def _metric_names(cfg: CfgNode) -> list[str]:
    """Name what the evaluator of a test set gives, as EvalHook names it."""
    if cfg.MODEL.META_ARCHITECTURE == "ProposalNetwork":
        return [f"box_proposals/AR{s}@{n}" for n in (100, 1000) for s in ("", "s", "m", "l")]
    voc = ("voc/AP50_area", "voc/AP50_11point")
    classes = class_names(cfg.DATASETS.TEST[0])
    return [
        *(f"bbox/{row[0]}" for row in COCO_ROWS),
        *voc,
        *(f"{key}-{name}" for key in ("bbox/AP", *voc) for name in classes),
    ]


def _unknown_metric(metric: str, names: Mapping[str, Any] | list[str]) -> str:
    listed = ", ".join([*names][:20]) + (", ..." if len(names) > 20 else "")
    return (
        f"TEST.BEST_METRIC {metric} is not among the results of the evaluation ({listed}): set it "
        "to one of them, or to '' to keep no best checkpoint."
    )
