"""`TrainLoop`: a training step in any precision that stops at losses that are not finite."""

import contextlib
import time
from collections.abc import Iterable, Iterator
from functools import reduce

import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from torch import Tensor, nn

from ..modeling import FCOSHead

PRECISIONS = ("auto", "float16", "bfloat16")


def autocast_dtype(precision: str, device_type: str) -> torch.dtype:
    """Return the data type for ``SOLVER.AMP.PRECISION``.

    Args:
        precision: "float16", "bfloat16", or "auto" for float16 on CUDA and bfloat16 elsewhere.
        device_type: of the model, "cuda" or "cpu".

    Raises:
        ValueError: unknown precision, or float16 without CUDA.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"SOLVER.AMP.PRECISION is {precision!r}, not one of {PRECISIONS}.")
    if precision == "float16" and device_type != "cuda":
        raise ValueError(
            f"SOLVER.AMP.PRECISION is 'float16', which needs CUDA, but the model is on the "
            f"{device_type}: set it to 'bfloat16' or 'auto'."
        )
    if precision == "auto":
        return torch.float16 if device_type == "cuda" else torch.bfloat16
    return getattr(torch, precision)


class TrainLoop(SimpleTrainer):
    """Detectron2's training step with any precision and a check of losses and gradients.

    Detectron2's ``AMPTrainer`` needs CUDA, and float16 up to v0.6. It and ``SimpleTrainer`` check
    the losses after the backward pass, on the main process only, without naming the images.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable[list[dict]],
        optimizer: torch.optim.Optimizer,
        precision: str | None = None,
    ):
        """Take the arguments of ``SimpleTrainer`` and the precision.

        Args:
            model: returns a dict of losses; wrapped for distributed training if needed.
            data_loader: batches, each a list of inputs of the model.
            optimizer: of the model's parameters.
            precision: see :func:`autocast_dtype`; None for the precision of the weights.

        Raises:
            ValueError: a precision that the device does not support.
        """
        super().__init__(model, data_loader, optimizer)
        self._device_type = next(model.parameters()).device.type
        self._dtype = None if precision is None else autocast_dtype(precision, self._device_type)
        # Only for float16: gradients in bfloat16 have the range of float32.
        self.grad_scaler = torch.amp.GradScaler(
            self._device_type, enabled=self._dtype == torch.float16
        )

    def run_step(self) -> None:
        """Train on one batch.

        Raises:
            FloatingPointError: a loss or a gradient is not finite, on any rank; all ranks raise,
                and the weights are unchanged.
        """
        assert self.model.training, "The model is in eval mode, where it returns no losses."
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start

        losses = self._compute_losses(data)
        self.optimizer.zero_grad()
        self.grad_scaler.scale(reduce(torch.add, losses.values())).backward()
        self._write_metrics(losses, data_time)
        self._check_gradients(data)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def state_dict(self) -> dict:
        """Return the iteration and the state of optimizer and gradient scaler."""
        return {**super().state_dict(), "grad_scaler": self.grad_scaler.state_dict()}

    def load_state_dict(self, state_dict: dict) -> None:
        """Load the result of :meth:`state_dict`; without a scaler's state, keep the initial one."""
        super().load_state_dict(state_dict)
        if state_dict.get("grad_scaler"):  # empty for other precisions than float16
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])

    def _compute_losses(self, data: list[dict]) -> dict[str, Tensor]:
        autocast = torch.autocast(
            self._device_type, dtype=self._dtype, enabled=self._dtype is not None
        )
        with _recorded_logits(self.model) as logits, autocast:
            losses = self.model(data)
        bad_ranks = _ranks_with_bad_losses(losses)
        if not bad_ranks:
            return losses
        if comm.get_rank() in bad_ranks:
            bad = [f"{k} is {x.item()}" for k, x in losses.items() if not x.isfinite()]
            raise self._error(f"{', '.join(bad)}.\n{_describe_logits(logits)}", data)
        ranks = ", ".join(map(str, bad_ranks))
        raise self._error(f"a loss of rank {ranks} is not finite; see its log.", data)

    def _check_gradients(self, data: list[dict]) -> None:
        """Raise if a gradient is not finite: clipping it would turn all weights into NaN.

        All ranks have the same gradients here. The device is idle, because the losses have just
        been read, so that another host-device sync costs little.
        """
        if self.grad_scaler.is_enabled():
            return  # it skips such a step and reduces its scale
        grads = {k: p.grad for k, p in self.model.named_parameters() if p.grad is not None}
        finite = torch.stack(torch._foreach_norm(list(grads.values()))).isfinite().tolist()
        bad = [name for name, good in zip(grads, finite, strict=True) if not good]
        if bad:
            raise self._error(
                f"the losses are finite, but the gradients of {len(bad)} parameters are not "
                f"({', '.join(bad[:3])}{', ...' if len(bad) > 3 else ''}).",
                data,
            )

    def _error(self, reason: str, data: list[dict]) -> FloatingPointError:
        files = ", ".join(str(x.get("file_name", "an image without a file")) for x in data)
        rank = f" on rank {comm.get_rank()}" if comm.get_world_size() > 1 else ""
        return FloatingPointError(
            f"Training stopped at iteration {self.iter}, before its optimizer step: {reason}\n"
            f"Images of this batch{rank}: {files}\n"
            "Weights and checkpoints are unchanged. Check the boxes of these images; lower "
            "SOLVER.BASE_LR or increase SOLVER.WARMUP_ITERS; then continue from the last "
            "checkpoint with --resume, or start again."
        )


@contextlib.contextmanager
def _recorded_logits(model: nn.Module) -> Iterator[list[Tensor]]:
    """Record the class logits of the FCOS heads in ``model`` inside the block."""
    logits: list[Tensor] = []
    # Removed again: a model with this hook could not be copied or pickled.
    handles = [
        module.register_forward_hook(lambda _module, _inputs, output: logits.append(output[0]))
        for module in model.modules()
        if isinstance(module, FCOSHead)
    ]
    try:
        yield logits
    finally:
        for handle in handles:
            handle.remove()


def _ranks_with_bad_losses(losses: dict[str, Tensor]) -> list[int]:
    """List the ranks with a loss that is not finite, on all ranks, with one host-device sync."""
    finite = torch.stack([x.isfinite() for x in losses.values()]).all()
    flags = torch.zeros(comm.get_world_size(), device=finite.device)
    flags[comm.get_rank()] = ~finite
    if comm.get_world_size() > 1:
        torch.distributed.all_reduce(flags)
    return flags.nonzero().flatten().tolist()


def _describe_logits(logits: list[Tensor]) -> str:
    if not logits:
        return "The model has no FCOSHead, so its logits are not known."
    values = torch.cat([x.detach().flatten().float() for x in logits])
    finite = values[values.isfinite()]
    largest = f"{finite.abs().max().item():.4g}" if len(finite) else "not finite"
    text = f"Largest absolute class logit of the head: {largest}"
    if len(finite) < len(values):
        text += f"; {len(values) - len(finite)} of {len(values)} are not finite"
    return f"{text}."
