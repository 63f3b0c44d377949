"""Time, peak memory, host-device syncs and kernels of a job.

``torch.utils.benchmark.Timer`` does not serve here: it can't give each run fresh arguments, and it
would time one job after the other instead of in turns.
"""

import contextlib
import dataclasses
import gc
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

_MIB = 2**20


@dataclasses.dataclass
class Job:
    """Work to measure."""

    name: str  # of the library
    run: Callable[..., Any]
    prepare: Callable[[], tuple] = tuple  # fresh arguments for each run, not measured
    variant: str = ""  # difference from the library as it is, such as "optimized"
    precision: str = "fp32"  # or "tf32", "bf16"
    compiled: bool = False  # backbone and head are compiled
    countable: bool = True  # memory, syncs and kernels are measured too


@dataclasses.dataclass
class Measurement:
    """Results of a job."""

    times: list[float]  # milliseconds of each round
    peak_mib: float | None = None  # most memory held at once, less what was held before
    syncs: int | None = None  # host-device syncs
    kernels: int | None = None  # kernels launched

    @property
    def median(self) -> float:
        """Median time in milliseconds."""
        return statistics.median(self.times)


def measure(
    jobs: Sequence[Job],
    rounds: int,
    device: str,
    warmup: int = 2,
    tick: Callable[[], Any] = lambda: None,
) -> list[Measurement]:
    """Time the jobs in turns; each round starts with another job.

    Args:
        jobs: the jobs to compare.
        rounds: timed runs of each.
        device: "cpu" or "cuda".
        warmup: runs of each before.
        tick: called after each timed run.
    """
    results = []
    for job in jobs:
        for _ in range(warmup):
            job.run(*job.prepare())
        # Operators of compiled code can be counted on the device only.
        countable = job.countable and (device == "cuda" or not job.compiled)
        results.append(Measurement([], *(count(job, device) if countable else ())))
    for start in range(rounds):
        for k in range(len(jobs)):
            index = (start + k) % len(jobs)
            results[index].times.append(time_once(jobs[index], device))
            tick()
    return results


def time_once(job: Job, device: str) -> float:
    """Return the milliseconds of one run, until the device is done."""
    arguments = job.prepare()
    _synchronize(device)
    start = time.perf_counter()
    result = job.run(*arguments)
    _synchronize(device)
    elapsed = time.perf_counter() - start
    del result  # freeing it is not part of the work
    return 1000 * elapsed


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def count(job: Job, device: str) -> tuple[float, int, int | None]:
    """Return peak memory in MiB, host-device syncs and kernels of a job.

    Kernels are counted by the operators called, and on a CPU so are the syncs that a GPU would
    have; kernels of compiled code can't be counted.
    """
    gc.collect()  # nothing else is freed meanwhile
    if device == "cuda":
        peak, syncs = count_on_cuda(job)
        kernels = None if job.compiled else count_operators(job)[1]
    else:
        peak = peak_memory_cpu(job)
        syncs, kernels = count_operators(job)
    return peak / _MIB, syncs, kernels


def peak_memory_cpu(job: Job) -> int:
    """Return the most bytes of tensors that a job holds at once, less those held before."""
    arguments = job.prepare()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = job.run(*arguments)
    del result
    events = [
        (event.start_ns(), event.nbytes())
        for event in profiler.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    held = peak = 0
    for _, size in sorted(events, key=lambda event: event[0]):  # stable: ties keep their order
        held += size
        peak = max(peak, held)
    return peak


def count_on_cuda(job: Job) -> tuple[int, int]:
    """Return the peak memory of a job in bytes and its host-device syncs."""
    arguments = job.prepare()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            job.run(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    syncs = sum("synchronizing CUDA operation" in str(x.message) for x in caught)
    return torch.cuda.max_memory_allocated() - before, syncs


def count_operators(job: Job) -> tuple[int, int]:
    """Return the host-device syncs and kernels that a job has on a GPU, by its operators."""
    arguments = job.prepare()
    operators = _Operators()
    with operators, _Transfers(operators):
        job.run(*arguments)
    return operators.syncs, operators.kernels


# The size of their result depends on the data, or they return a Python number.
_SYNCS = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::equal",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "torchvision::nms",
}
# They write nothing.
_NO_KERNEL = {
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::new_empty",
    "aten::new_empty_strided",
    "aten::_unsafe_view",
    "aten::_local_scalar_dense",
}


class _Operators(TorchDispatchMode):
    """Counts operators that synchronise with a GPU, and operators that launch a kernel."""

    def __init__(self):
        super().__init__()
        self.syncs = self.kernels = 0
        self.paused = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not self.paused:
            self.syncs += _synchronizes(func, args, kwargs)
            self.kernels += not _is_view(func) and func._schema.name not in _NO_KERNEL
        return func(*args, **kwargs)


def _is_view(func: torch._ops.OpOverload) -> bool:
    aliases = [x.alias_info for x in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def _synchronizes(func: torch._ops.OpOverload, args: tuple, kwargs: dict) -> bool:
    name = func._schema.name
    if name == "aten::repeat_interleave":
        return kwargs.get("output_size") is None
    if name == "aten::index":
        return _has_mask(args[1])
    if name in ("aten::index_put", "aten::index_put_"):
        # A single value is filled in without knowing the number of places.
        return _has_mask(args[1]) and args[2].numel() != 1
    return name in _SYNCS


def _has_mask(indices: Sequence) -> bool:
    return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in indices)


class _Transfers(TorchFunctionMode):
    """Counts copies to the host, which call no operator when the tensor is on the CPU already."""

    def __init__(self, operators: _Operators):
        super().__init__()
        self.operators = operators

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy):
            self.operators.syncs += 1
        if func is not torch.nn.functional.one_hot:
            return func(*args, **kwargs)
        # It checks its values on CPUs only. On a GPU: zeros and a scatter, no sync.
        self.operators.kernels += 2
        self.operators.paused = True
        try:
            return func(*args, **kwargs)
        finally:
            self.operators.paused = False


@contextlib.contextmanager
def precision_context(precision: str, device: str, autocast: bool = True) -> Iterator[None]:
    """Compute in "fp32", "tf32" or, by autocast, "bf16" in the block; TF32 is off in the others."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    try:
        with torch.autocast(device, torch.bfloat16, enabled=autocast and precision == "bf16"):
            yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
