"""How long a job takes, how much memory, how many waits for the device and kernels."""

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
from torch.utils.flop_counter import FlopCounterMode

_MIB = 2**20


@dataclasses.dataclass
class Job:
    """Something to measure.

    Attributes:
        name: what it is called in the results.
        run: the work.
        prepare: gives fresh arguments for each run, outside of what is measured.
        countable: whether memory, waits and kernels are measured too.
    """

    name: str
    run: Callable[..., Any]
    prepare: Callable[[], tuple] = tuple
    countable: bool = True


@dataclasses.dataclass
class Measurement:
    """What was measured of a job.

    Attributes:
        times: milliseconds of each round.
        peak_mib: most memory that was held at once above what was held before, in MiB.
        syncs: waits of the host for the device.
        kernels: kernels launched.
    """

    times: list[float]
    peak_mib: float | None = None
    syncs: int | None = None
    kernels: int | None = None

    @property
    def median(self) -> float:
        """The median time in milliseconds."""
        return statistics.median(self.times)


def measure(
    jobs: Sequence[Job],
    rounds: int,
    device: str,
    warmup: int = 2,
    tick: Callable[[], Any] = lambda: None,
) -> list[Measurement]:
    """Time the jobs round by round, each round in another order, after a warm-up.

    Args:
        jobs: those to compare.
        rounds: how often each is timed.
        device: "cpu" or "cuda".
        warmup: runs of each that don't count.
        tick: called after each timed run.
    """
    results = []
    for job in jobs:
        for _ in range(warmup):
            job.run(*job.prepare())
        results.append(Measurement([], *(count(job, device) if job.countable else ())))
    for number in range(rounds):
        for index in rotated(len(jobs), number):
            results[index].times.append(time_once(jobs[index], device))
            tick()
    return results


def rotated(count: int, number: int) -> list[int]:
    """The indices below ``count``, starting with another one each round."""
    return [(number + k) % count for k in range(count)]


def time_once(job: Job, device: str) -> float:
    """Milliseconds of one run, to its end on the device."""
    arguments = job.prepare()
    synchronize(device)
    start = time.perf_counter()
    result = job.run(*arguments)
    synchronize(device)
    elapsed = time.perf_counter() - start
    del result  # freeing it is not part of the work
    return 1000 * elapsed


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def count(job: Job, device: str) -> tuple[float, int, int]:
    """Peak memory in MiB, waits of the host and kernels of a job.

    On a CPU waits and kernels are those that a GPU would have, told by the operators.
    """
    gc.collect()  # nothing else is freed meanwhile
    if device == "cuda":
        peak = _peak_memory_cuda(job)
        return peak / _MIB, _count_syncs_cuda(job), _count_kernels_cuda(job)
    peak = peak_memory_cpu(job)
    syncs, kernels = count_operators(job)
    return peak / _MIB, syncs, kernels


def peak_memory_cpu(job: Job) -> int:
    """Most bytes of tensors held at once by a job, above those held before."""
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


def _peak_memory_cuda(job: Job) -> int:
    arguments = job.prepare()
    synchronize("cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    job.run(*arguments)
    synchronize("cuda")
    return torch.cuda.max_memory_allocated() - before


def _count_syncs_cuda(job: Job) -> int:
    arguments = job.prepare()
    synchronize("cuda")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            job.run(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(x.message) for x in caught)


def _count_kernels_cuda(job: Job) -> int:
    arguments = job.prepare()
    synchronize("cuda")
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        job.run(*arguments)
        synchronize("cuda")
    events = profiler.profiler.kineto_results.events()
    on_device = [x for x in events if x.device_type() == torch.autograd.DeviceType.CUDA]
    return sum(not x.name().startswith(("Memcpy", "Memset")) for x in on_device)


def count_operators(job: Job) -> tuple[int, int]:
    """Waits and kernels that a job would have on a GPU, told by the operators that it calls."""
    arguments = job.prepare()
    operators, transfers = _Operators(), _Transfers()
    transfers.operators = operators
    with operators, transfers:
        job.run(*arguments)
    return operators.syncs + transfers.syncs, operators.kernels


# The size of what they return depends on the data, or they return a Python number.
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
# Nothing is written.
_ALLOCATIONS = {
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::new_empty",
    "aten::new_empty_strided",
}
_NO_KERNEL = {*_ALLOCATIONS, "aten::_unsafe_view", "aten::_local_scalar_dense"}


class _Operators(TorchDispatchMode):
    """Counts operators that would wait for a GPU, and operators that would launch a kernel."""

    def __init__(self):
        super().__init__()
        self.syncs = self.kernels = 0
        self.paused = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not self.paused:
            self.syncs += _waits(func, args, kwargs)
            self.kernels += not _is_view(func) and func._schema.name not in _NO_KERNEL
        return func(*args, **kwargs)


def _is_view(func: torch._ops.OpOverload) -> bool:
    aliases = [x.alias_info for x in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def _waits(func: torch._ops.OpOverload, args: tuple, kwargs: dict) -> bool:
    name = func._schema.name
    if name == "aten::repeat_interleave":
        return kwargs.get("output_size") is None
    if name == "aten::index":
        return _has_mask(args[1])
    if name in ("aten::index_put", "aten::index_put_"):
        # One number into a mask is filled in without knowing how many places there are.
        return _has_mask(args[1]) and args[2].numel() != 1
    return name in _SYNCS


def _has_mask(indices: Sequence) -> bool:
    return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in indices)


class _Transfers(TorchFunctionMode):
    """Counts copies to the host, which are no operators when the tensor is there already."""

    operators: _Operators

    def __init__(self):
        super().__init__()
        self.syncs = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy):
            self.syncs += 1
        if func is not torch.nn.functional.one_hot:
            return func(*args, **kwargs)
        # Its checks of the values are made on CPUs only: zeros and a scatter, no wait.
        self.operators.kernels += 2
        self.operators.paused = True
        try:
            return func(*args, **kwargs)
        finally:
            self.operators.paused = False


def convolution_flops(job: Job) -> int:
    """Floating-point operations of a job's convolutions, a multiplication and an addition each."""
    with FlopCounterMode(display=False) as counter:
        job.run(*job.prepare())
    flops = counter.get_flop_counts().get("Global", {})
    return sum(number for operator, number in flops.items() if "convolution" in str(operator))


def matmul_flops_per_second(precision: str, device: str, repeats: int = 8) -> float:
    """The most that large square matrix multiplications reach, the roof for convolutions."""
    size = 8192 if device == "cuda" else 1536
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    with matmul_precision(precision), torch.no_grad():
        one, other = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        job = Job("matmul", lambda: one @ other, countable=False)
        best = min(measure([job], repeats, device)[0].times)
    return 2 * size**3 / (best / 1000)


@contextlib.contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Allow TF32 in float32 convolutions and matrix products if it is "tf32", else not."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def autocast(precision: str, device: str) -> torch.autocast:
    """Automatic mixed precision if it is "bf16", else nothing."""
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")
