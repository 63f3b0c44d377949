"""The linear scaling rule for the batch size."""

import logging
from collections.abc import Collection

from detectron2.config import CfgNode

logger = logging.getLogger(__name__)

# Divided by the factor of the batch, so that training sees the same number of images.
_ITERATION_KEYS = (
    "SOLVER.MAX_ITER",
    "SOLVER.STEPS",
    "SOLVER.WARMUP_ITERS",
    "SOLVER.CHECKPOINT_PERIOD",
    "TEST.EVAL_PERIOD",
)
_SCALED_KEYS = ("SOLVER.BASE_LR", *_ITERATION_KEYS, "MODEL_EMA.DECAY")


def scale_to_batch_size(cfg: CfgNode, keep: Collection[str] = ()) -> None:
    """Adapt the schedule in ``cfg``, in place, to another batch size than the recipe's.

    The linear scaling rule (Goyal et al. 2017), as in Detectron2 for SOLVER.REFERENCE_WORLD_SIZE:
    with f = IMS_PER_BATCH / REFERENCE_IMS_PER_BATCH, the learning rate is multiplied by f, counts
    of iterations are divided by f, and MODEL_EMA.DECAY becomes its f-th power. Afterwards the
    reference is the batch size itself, so that a dumped config is not scaled again.

    A warm-up that does not end before the training is shortened to a tenth of it.

    Args:
        cfg: not frozen.
        keep: keys set by hand, which are not scaled. If SOLVER.MAX_ITER is among them, no count of
            iterations is.
    """
    solver = cfg.SOLVER
    if solver.REFERENCE_IMS_PER_BATCH <= 0:
        logger.info("Learning rate %g, not scaled to the batch size.", solver.BASE_LR)
        return
    factor = solver.IMS_PER_BATCH / solver.REFERENCE_IMS_PER_BATCH
    if factor != 1 and "SOLVER.BASE_LR" not in keep:
        solver.BASE_LR *= factor
    # A MAX_ITER set by hand counts iterations of this batch size, and so do the other counts.
    if factor != 1 and "SOLVER.MAX_ITER" not in keep:
        for key in _ITERATION_KEYS:
            node, name = cfg[key.split(".")[0]], key.split(".")[1]
            if key in keep:
                continue
            if isinstance(node[name], int):
                node[name] = _divide(node[name], factor)
            else:
                node[name] = tuple(_divide(count, factor) for count in node[name])
        if "MODEL_EMA.DECAY" not in keep:
            cfg.MODEL_EMA.DECAY **= factor
    if solver.WARMUP_ITERS >= solver.MAX_ITER:
        logger.warning(
            "SOLVER.WARMUP_ITERS %d does not end before MAX_ITER %d: reduced to a tenth of it.",
            solver.WARMUP_ITERS,
            solver.MAX_ITER,
        )
        solver.WARMUP_ITERS = solver.MAX_ITER // 10
    logger.info(
        "Batch of %d images, recipe's %d: learning rate %g, %d iterations, warm-up %d%s%s.",
        solver.IMS_PER_BATCH,
        solver.REFERENCE_IMS_PER_BATCH,
        solver.BASE_LR,
        solver.MAX_ITER,
        solver.WARMUP_ITERS,
        f", EMA decay {cfg.MODEL_EMA.DECAY:g}" if cfg.MODEL_EMA.ENABLED else "",
        _kept(keep) if factor != 1 else "",
    )
    solver.REFERENCE_IMS_PER_BATCH = solver.IMS_PER_BATCH


def _divide(count: int, factor: float) -> int:
    # A period of 0 means never.
    return max(1, round(count / factor)) if count > 0 else count


def _kept(keep: Collection[str]) -> str:
    set_by_hand = [key for key in _SCALED_KEYS if key in keep]
    return f" (set by hand: {', '.join(set_by_hand)})" if set_by_hand else ""
