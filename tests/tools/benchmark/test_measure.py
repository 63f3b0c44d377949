"""The measuring itself, on work whose cost is known."""

import time
import warnings

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import nms

from benchmark.measure import (
    Job,
    Measurement,
    count,
    count_on_cuda,
    count_operators,
    measure,
    peak_memory_cpu,
    precision_context,
)

X = torch.arange(6.0)
MASK = X > 2
BOXES = torch.tensor([[0.0, 0, 1, 1], [0, 0, 1, 1]])


def test_peak_memory_is_the_most_held_at_once():
    def run():
        a = torch.ones(1000)  # 4000 bytes
        b = a + 1  # 8000
        del a  # 4000
        c = torch.zeros(2000)  # 12000, the most
        del b  # 8000
        return c, torch.ones(500)  # 10000

    assert peak_memory_cpu(Job("", run)) == 12000


def test_peak_memory_leaves_out_what_is_prepared():
    job = Job("", lambda x: x + 1, prepare=lambda: (torch.ones(100_000),))
    assert 400_000 <= peak_memory_cpu(job) < 400_100  # and the number 1


def test_peak_memory_counts_gradients():
    x = torch.ones(1000, requires_grad=True)
    # The product, its sum (a scalar) and its gradient of one are gone or small beside these.
    peak = peak_memory_cpu(Job("", lambda: (x * x).sum().backward()))
    assert 8000 <= peak <= 12_100


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (lambda: X.sum().item(), 1),
        (lambda: bool(MASK.any()), 1),
        (lambda: X.tolist(), 1),
        (lambda: X.cpu().numpy(), 2),
        (lambda: MASK.nonzero(), 1),
        (lambda: torch.where(MASK), 1),
        (lambda: torch.where(MASK, X, X), 0),
        (lambda: X[MASK], 1),
        (lambda: X.masked_select(MASK), 1),
        (lambda: X[torch.tensor([0, 1])], 0),
        (lambda: X.clone().__setitem__(MASK, 0.0), 0),
        (lambda: X.clone().__setitem__(MASK, torch.ones(3)), 1),
        (lambda: X.unique(), 1),
        (lambda: torch.equal(X, X), 1),
        (lambda: X.repeat_interleave(X.long()), 1),
        (lambda: X.repeat_interleave(X.long(), output_size=15), 0),
        (lambda: F.one_hot(X.long(), 6), 0),
        (lambda: nms(BOXES, torch.ones(2), 0.5), 1),
        (lambda: (X + 1).view(2, 3).t().reshape(-1), 0),
    ],
)
def test_host_device_syncs(run, expected):
    assert count_operators(Job("", run))[0] == expected


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (lambda: X.view(2, 3)[0].t(), 0),
        (lambda: torch.empty(3), 0),
        (lambda: torch.zeros(3), 1),
        (lambda: (X + 1) * 2, 2),
        (lambda: X.view(2, 3).t().reshape(-1), 1),  # a copy
        (lambda: X.clone().add_(1), 2),
        (lambda: F.one_hot(X.long(), 6), 3),
    ],
)
def test_kernels(run, expected):
    assert count_operators(Job("", run))[1] == expected


def test_operators_of_the_backward_pass_count():
    x = torch.ones(3, requires_grad=True)
    forward = count_operators(Job("", lambda: (x * 2).sum()))[1]
    assert count_operators(Job("", lambda: (x * 2).sum().backward()))[1] > forward


def test_syncs_on_cuda_are_its_warnings(monkeypatch):
    modes = []
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 350)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def run():
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    assert count_on_cuda(Job("", run)) == (250, 3)
    assert modes == ["warn", "default"]


def test_jobs_take_turns_and_each_round_starts_with_another():
    calls = []
    jobs = [Job(x, lambda x=x: calls.append(x), countable=False) for x in "abc"]
    ticks = []
    results = measure(jobs, 4, "cpu", warmup=1, tick=lambda: ticks.append(1))
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab" + "abc"
    assert [len(x.times) for x in results] == [4, 4, 4] and len(ticks) == 12


def test_the_time_is_that_of_the_run_alone():
    def prepare():
        time.sleep(0.2)
        return (0.02,)

    result = measure([Job("", time.sleep, prepare, countable=False)], 2, "cpu", warmup=0)[0]
    assert 20 <= min(result.times) and max(result.times) < 200


def test_median():
    assert Measurement([9.0, 1.0, 2.0]).median == 2.0
    assert Measurement([9.0, 1.0, 2.0, 4.0]).median == 3.0


def test_count_gives_memory_in_mib_syncs_and_kernels():
    job = Job("", lambda: torch.ones(2**18).sum().item())
    peak, syncs, kernels = count(job, "cpu")
    assert peak == pytest.approx(1, abs=0.01) and (syncs, kernels) == (1, 2)


def test_precisions_are_set_and_restored():
    def state():
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    before = state()
    for precision, expected in (("tf32", ("high", True)), ("fp32", ("highest", False))):
        with precision_context(precision, "cpu"):
            assert state() == expected
    assert state() == before
    one = torch.ones(2, 2)
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        with precision_context(precision, "cpu"):
            assert (one @ one).dtype == dtype
    with precision_context("bf16", "cpu", autocast=False):
        assert (one @ one).dtype == torch.float32
