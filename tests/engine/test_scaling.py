"""The linear scaling rule for the batch size."""

import pytest

from fcos_d2.engine import scale_to_batch_size


@pytest.fixture
def cfg(tiny_cfg):
    tiny_cfg.SOLVER.REFERENCE_IMS_PER_BATCH = 16
    tiny_cfg.SOLVER.BASE_LR = 0.01
    tiny_cfg.SOLVER.MAX_ITER = 90000
    tiny_cfg.SOLVER.STEPS = (60000, 80000)
    tiny_cfg.SOLVER.WARMUP_ITERS = 1000
    tiny_cfg.SOLVER.CHECKPOINT_PERIOD = 5000
    tiny_cfg.TEST.EVAL_PERIOD = 0
    tiny_cfg.MODEL_EMA.DECAY = 0.999
    return tiny_cfg


def schedule(cfg):
    solver = cfg.SOLVER
    periods = (solver.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD)
    return solver.BASE_LR, solver.MAX_ITER, tuple(solver.STEPS), solver.WARMUP_ITERS, *periods


RECIPE = (0.01, 90000, (60000, 80000), 1000, 5000, 0)


@pytest.mark.parametrize(
    ("reference", "batch", "keep", "expected", "decay"),
    [
        # A quarter of the rate, four times the iterations; a period of 0 stays 0; after 4
        # iterations of 4 images the average keeps the share that it keeps after one of 16.
        (16, 4, [], (0.0025, 360000, (240000, 320000), 4000, 20000, 0), 0.999**0.25),
        (16, 32, [], (0.02, 45000, (30000, 40000), 500, 2500, 0), 0.998001),
        (16, 16, [], RECIPE, 0.999),
        (0, 2, [], RECIPE, 0.999),
        # Set by hand: without MAX_ITER no count is scaled.
        (16, 32, ["SOLVER.MAX_ITER"], (0.02, *RECIPE[1:]), 0.999),
        (16, 32, ["SOLVER.WARMUP_ITERS"], (0.02, 45000, (30000, 40000), 1000, 2500, 0), 0.998001),
        (16, 32, ["SOLVER.BASE_LR"], (0.01, 45000, (30000, 40000), 500, 2500, 0), 0.998001),
        (16, 32, ["MODEL_EMA.DECAY"], (0.02, 45000, (30000, 40000), 500, 2500, 0), 0.999),
    ],
)
def test_schedule(cfg, reference, batch, keep, expected, decay):
    cfg.SOLVER.REFERENCE_IMS_PER_BATCH, cfg.SOLVER.IMS_PER_BATCH = reference, batch
    for keys in (keep, []):  # a dumped config is not scaled again
        scale_to_batch_size(cfg, keep=keys)
        assert schedule(cfg) == expected
        assert cfg.MODEL_EMA.DECAY == pytest.approx(decay, rel=1e-12)


def test_a_warm_up_that_outlasts_the_training(cfg, caplog):
    """Warm-up 1000 of 1000 iterations becomes 1000 / 10."""
    cfg.SOLVER.IMS_PER_BATCH = 16
    cfg.SOLVER.MAX_ITER = 1000
    scale_to_batch_size(cfg)
    assert cfg.SOLVER.WARMUP_ITERS == 100
    assert "reduced to a tenth" in caplog.text


def test_a_period_never_becomes_never(cfg):
    cfg.SOLVER.IMS_PER_BATCH = 1600
    cfg.TEST.EVAL_PERIOD = 10
    scale_to_batch_size(cfg)
    assert cfg.TEST.EVAL_PERIOD == 1
