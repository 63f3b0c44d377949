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
    return tiny_cfg


def schedule(cfg):
    solver = cfg.SOLVER
    return (
        solver.BASE_LR,
        solver.MAX_ITER,
        tuple(solver.STEPS),
        solver.WARMUP_ITERS,
        solver.CHECKPOINT_PERIOD,
        cfg.TEST.EVAL_PERIOD,
    )


def test_a_quarter_of_the_batch_by_hand(cfg):
    """Batch 4 of 16: a quarter of the rate, four times the iterations; a period of 0 stays 0."""
    cfg.SOLVER.IMS_PER_BATCH = 4
    scale_to_batch_size(cfg)
    assert schedule(cfg) == (0.0025, 360000, (240000, 320000), 4000, 20000, 0)
    # What a dumped config says is what was used.
    scale_to_batch_size(cfg)
    assert schedule(cfg) == (0.0025, 360000, (240000, 320000), 4000, 20000, 0)


def test_the_recipes_own_batch_changes_nothing(cfg):
    cfg.SOLVER.IMS_PER_BATCH = 16
    before = schedule(cfg)
    scale_to_batch_size(cfg)
    assert schedule(cfg) == before


@pytest.mark.parametrize(
    "opts, keep, decay",
    [
        # After 4 iterations of 4 images the average keeps what it keeps after one of 16.
        ({"IMS_PER_BATCH": 4}, [], 0.999**0.25),
        ({"IMS_PER_BATCH": 32}, [], 0.998001),
        ({"IMS_PER_BATCH": 32}, ["MODEL_EMA.DECAY"], 0.999),
        ({"IMS_PER_BATCH": 32}, ["SOLVER.MAX_ITER"], 0.999),
        ({"IMS_PER_BATCH": 16}, [], 0.999),
    ],
)
def test_the_average_is_over_as_many_images(cfg, opts, keep, decay):
    cfg.MODEL_EMA.DECAY = 0.999
    cfg.SOLVER.merge_from_list([x for pair in opts.items() for x in pair])
    scale_to_batch_size(cfg, keep=keep)
    assert cfg.MODEL_EMA.DECAY == pytest.approx(decay, rel=1e-12)
    scale_to_batch_size(cfg)
    assert cfg.MODEL_EMA.DECAY == pytest.approx(decay, rel=1e-12)


def test_what_was_set_by_hand_stays(cfg):
    cfg.SOLVER.IMS_PER_BATCH = 32
    scale_to_batch_size(cfg, keep=["SOLVER.MAX_ITER", "SOLVER.IMS_PER_BATCH"])
    assert schedule(cfg) == (0.02, 90000, (60000, 80000), 1000, 5000, 0)


def test_one_count_set_by_hand(cfg):
    cfg.SOLVER.IMS_PER_BATCH = 32
    scale_to_batch_size(cfg, keep=["SOLVER.WARMUP_ITERS", "SOLVER.BASE_LR"])
    assert schedule(cfg) == (0.01, 45000, (30000, 40000), 1000, 2500, 0)


def test_a_warm_up_that_outlasts_the_training(cfg, caplog):
    """Warm-up 1000 of 1000 iterations becomes 1000 / 10."""
    cfg.SOLVER.IMS_PER_BATCH = 16
    cfg.SOLVER.MAX_ITER = 1000
    scale_to_batch_size(cfg)
    assert cfg.SOLVER.WARMUP_ITERS == 100
    assert "reduced to a tenth" in caplog.text


def test_no_reference_no_scaling(cfg):
    cfg.SOLVER.REFERENCE_IMS_PER_BATCH = 0
    cfg.SOLVER.IMS_PER_BATCH = 2
    before = schedule(cfg)
    scale_to_batch_size(cfg)
    assert schedule(cfg) == before


def test_a_period_never_becomes_never(cfg):
    cfg.SOLVER.IMS_PER_BATCH = 1600
    cfg.TEST.EVAL_PERIOD = 10
    scale_to_batch_size(cfg)
    assert cfg.TEST.EVAL_PERIOD == 1
