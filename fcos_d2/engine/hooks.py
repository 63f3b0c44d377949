"""Hooks for the best checkpoint, early stopping and metrics.json, and the check of their keys."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.engine.hooks import PeriodicWriter
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from detectron2.utils.events import EventWriter

from ..checkpoint import FCOSCheckpointer
from ..data import class_names
from ..evaluation.coco_evaluation import COCO_ROWS

BEST_NAME = "model_best"
FINAL_NAME = "model_final"  # as in Detectron2's PeriodicCheckpointer

_TABLES = ("bbox", "voc", "box_proposals")  # of this package's evaluators

logger = logging.getLogger(__name__)


class EarlyStop(BaseException):
    """Raised to leave Detectron2's training loop; its message is the reason.

    Not an ``Exception``, which the loop would log as a failure.
    """


class BestCheckpoint(HookBase):
    """Save the weights of the best evaluation as ``model_best.pth``, and stop a run early.

    The trainer calls :meth:`update` with the results of each evaluation. When patience is
    exhausted, the run stops before the next iteration, and so does a run that is resumed from
    there with the same patience. Detectron2's ``BestCheckpointer`` (from v0.6) keeps no state for
    a resumed run, saves no averaged weights and does not stop.

    Args:
        checkpointer: of the run.
        metric: name as in metrics.json; higher is better.
        patience: evaluations in a row without improvement before the run stops; 0 never stops.
    """

    def __init__(self, checkpointer: FCOSCheckpointer, metric: str, patience: int = 0):
        self._checkpointer = checkpointer
        self._metric = metric
        self._patience = patience
        self._best = float("-inf")
        self._iteration = -1  # of the best, counted from 0 as in the names of checkpoints
        self._num_worse = 0  # evaluations since

    def update(self, results: Mapping[str, Any]) -> None:
        """Compare an evaluation with the best one so far; called on all ranks.

        nan is never better. A checkpoint of the same iteration is saved again, so that a run
        resumed from it includes this evaluation.

        Args:
            results: nested dict of numbers; the main process's count.

        Raises:
            ValueError: the metric is not among the results, and early stopping needs it; a
                checkpoint is saved first. Without early stopping that is logged as an error.
        """
        results = flatten_results_dict(results)
        # Only the main process has results, and all ranks must stop at the same iteration.
        value = comm.all_gather(results.get(self._metric))[0]
        iteration = min(self.trainer.iter, self.trainer.max_iter - 1)
        if value is None:
            message = _unknown_metric(self._metric, results)
            if not self._patience:
                logger.error("No best checkpoint is saved: %s", message)
                return
            if self._checkpointer.last_iteration != iteration:
                self._checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
            raise ValueError(message)
        if value > self._best:
            self._best, self._iteration, self._num_worse = float(value), iteration, 0
            best = {"metric": self._metric, "value": self._best}
            self._checkpointer.save_weights(BEST_NAME, iteration=iteration, best=best)
            logger.info("%s %.4f is the best so far: saved as %s.pth", *best.values(), BEST_NAME)
        else:
            self._num_worse += 1
            logger.info("%s %.4f; %s", self._metric, value, self._standing())
        if self._iteration >= 0:
            name = f"{self._metric}_best"
            self.trainer.storage.put_scalar(name, self._best, smoothing_hint=False)
        if self._is_exhausted():
            self._checkpointer.save(FINAL_NAME, iteration=iteration)
        elif self._checkpointer.last_iteration == iteration:
            self._checkpointer.save_again()

    def before_step(self) -> None:
        """Stop the run if patience is exhausted.

        Raises:
            EarlyStop: patience is exhausted.
        """
        if self._is_exhausted():
            raise EarlyStop(
                f"Stopped early after {self.trainer.iter} iterations: {self._standing()}. "
                f"TEST.EARLY_STOP_PATIENCE is {self._patience}: to continue, --resume with a "
                "larger one, or with 0."
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the best value, its iteration and the number of evaluations since."""
        return {
            "metric": self._metric,
            "value": self._best,
            "iteration": self._iteration,
            "num_worse": self._num_worse,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the result of :meth:`state_dict`, unless it is of another metric."""
        if state["metric"] != self._metric:
            logger.warning(
                "TEST.BEST_METRIC was %s and is %s now: the search for the best starts again.",
                state["metric"],
                self._metric,
            )
            return
        self._best, self._iteration = state["value"], state["iteration"]
        self._num_worse = state["num_worse"]

    def _is_exhausted(self) -> bool:
        return 0 < self._patience <= self._num_worse

    def _standing(self) -> str:
        times = f"{self._num_worse} evaluation{'s' if self._num_worse > 1 else ''}"
        if self._iteration < 0:
            return f"{times} without a value of {self._metric}"
        return (
            f"{times} without a better {self._metric} than {self._best:.4f} of iteration "
            f"{self._iteration} ({BEST_NAME}.pth)"
        )


class EvaluationWriter(PeriodicWriter):
    """Detectron2's ``PeriodicWriter`` that also writes in each iteration with an evaluation.

    Otherwise results appear in metrics.json with the losses of a later iteration.
    """

    def __init__(self, writers: list[EventWriter], eval_period: int):
        super().__init__(writers)
        self._eval_period = eval_period

    def after_step(self) -> None:
        """Write if Detectron2 does, or if there was an evaluation."""
        if self._eval_period > 0 and (self.trainer.iter + 1) % self._eval_period == 0:
            for writer in self._writers:
                writer.write()
        else:
            super().after_step()


def check_hooks(cfg: CfgNode) -> None:
    """Check MODEL_EMA.*, TEST.BEST_METRIC and TEST.EARLY_STOP_PATIENCE.

    Raises:
        ValueError: an invalid value, with the key to set.
    """
    ema, test = cfg.MODEL_EMA, cfg.TEST
    if ema.ENABLED and not 0 < ema.DECAY < 1:
        raise ValueError(
            f"MODEL_EMA.DECAY is {ema.DECAY}: set it to a number between 0 and 1, such as 0.999, "
            "or MODEL_EMA.ENABLED to False."
        )
    if ema.ENABLED and test.PRECISE_BN.ENABLED:
        raise ValueError(
            "TEST.PRECISE_BN.ENABLED measures statistics of the raw weights, but MODEL_EMA.ENABLED "
            "evaluates averaged weights: set one of the two to False."
        )
    patience = test.EARLY_STOP_PATIENCE
    if patience < 0:
        raise ValueError(
            f"TEST.EARLY_STOP_PATIENCE is {patience}: set it to a number of evaluations, or to 0 "
            "to train up to SOLVER.MAX_ITER."
        )
    required = {
        "TEST.EVAL_PERIOD": test.EVAL_PERIOD > 0,
        "DATASETS.TEST": len(cfg.DATASETS.TEST) > 0,
        "TEST.BEST_METRIC": test.BEST_METRIC != "",
    }
    missing = [key for key, is_set in required.items() if not is_set]
    if patience and missing:
        raise ValueError(
            f"TEST.EARLY_STOP_PATIENCE is {patience}, but {missing[0]} is not set: set "
            f"{missing[0]}, or TEST.EARLY_STOP_PATIENCE to 0."
        )
    best_metric(cfg)


def best_metric(cfg: CfgNode) -> str:
    """Return the full name of TEST.BEST_METRIC, as in metrics.json; "" for no best checkpoint.

    With several test sets the first is meant, unless the name begins with one of them. For a
    ``ProposalNetwork``, the default bbox/AP means the recall of 1000 proposals. A table that
    ``Trainer`` does not compute, such as segm/AP, may come from a subclass's evaluator.

    Raises:
        ValueError: no such metric in a table of ``Trainer``'s evaluators, or a name without table.
    """
    metric, tests = cfg.TEST.BEST_METRIC, list(dict.fromkeys(cfg.DATASETS.TEST))
    if not metric or not tests:
        return ""
    names = _metric_names(cfg)
    if metric == "bbox/AP" and metric not in names:
        metric = "box_proposals/AR@1000"
    if len(tests) > 1:
        names = [f"{test}/{name}" for test in tests for name in names]
        if not metric.startswith(tuple(f"{test}/" for test in tests)):
            metric = f"{tests[0]}/{metric}"
    if metric not in names and f"/{metric}".split("/")[-2] in ("", *_TABLES):
        raise ValueError(_unknown_metric(metric, names))
    return metric


def _metric_names(cfg: CfgNode) -> list[str]:
    """Results of the evaluator of a test set, named as ``EvalHook`` does."""
    if cfg.MODEL.META_ARCHITECTURE == "ProposalNetwork":
        return [f"box_proposals/AR{s}@{n}" for n in (100, 1000) for s in ("", "s", "m", "l")]
    voc = ("voc/AP50_area", "voc/AP50_11point")
    classes = class_names(cfg.DATASETS.TEST[0])
    return [
        *(f"bbox/{row[0]}" for row in COCO_ROWS),
        *voc,
        *(f"{key}-{name}" for key in ("bbox/AP", *voc) for name in classes),
    ]


def _unknown_metric(metric: str, names: Iterable[str]) -> str:
    names = list(names)
    listed = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    return (
        f"TEST.BEST_METRIC {metric} is not among the results of the evaluation ({listed}): set it "
        "to one of them, or to '' to save no best checkpoint."
    )
