"""`TrainLoop`: a training step in single or half precision that stops before it spoils a run."""

import contextlib
import time
from collections.abc import Iterable, Iterator

import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from torch import Tensor, nn

from ..modeling import FCOSHead

PRECISIONS = ("auto", "float16", "bfloat16")


def autocast_dtype(precision: str, device_type: str) -> torch.dtype:
    """Return the half precision that ``SOLVER.AMP.PRECISION`` names.

    Args:
        precision: "float16", "bfloat16", or "auto" for the first on CUDA and the second elsewhere.
        device_type: of the model, "cuda" or "cpu".

    Raises:
        ValueError: another name, or float16 on another device than CUDA.
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
    """Detectron2's training step with any precision and a guard against what is not finite.

    Detectron2's ``AMPTrainer`` runs on CUDA only, and in its older versions in float16 only. It
    and ``SimpleTrainer`` look at the losses when the gradients are there, on the main process
    alone, and don't say which images they come from.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable[list[dict]],
        optimizer: torch.optim.Optimizer,
        precision: str | None = None,
    ):
        """Take the arguments of ``SimpleTrainer`` and one more.

        Args:
            model: gives a dict of losses; wrapped for distributed training where need be.
            data_loader: batches, each a list of inputs of the model.
            optimizer: of the model's parameters.
            precision: None trains in the precision of the weights; else see
                :func:`autocast_dtype`.

        Raises:
            ValueError: a precision that the device can't train in.
        """
        super().__init__(model, data_loader, optimizer)
        self._device_type = next(model.parameters()).device.type
        self._dtype = None if precision is None else autocast_dtype(precision, self._device_type)
        # float16 alone needs it: the gradients of bfloat16 have the range of float32.
        self.grad_scaler = torch.amp.GradScaler(
            self._device_type, enabled=self._dtype == torch.float16
        )

    def run_step(self) -> None:
        """Train on one batch.

        Raises:
            FloatingPointError: a loss or a gradient that is not finite, on whatever rank; every
                rank raises, and nothing of the weights has changed.
        """
        assert self.model.training, "The model was put into eval mode: it gives no losses there."
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start

        losses = self._compute_losses(data)
        self.optimizer.zero_grad()
        self.grad_scaler.scale(sum(losses.values())).backward()
        self._write_metrics(losses, data_time)
        self._check_gradients(data)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def state_dict(self) -> dict:
        """Return what training goes on from: iteration, optimizer, scale of the gradients."""
        return {**super().state_dict(), "grad_scaler": self.grad_scaler.state_dict()}

    def load_state_dict(self, state_dict: dict) -> None:
        """Take up what :meth:`state_dict` gave; without a scale, that of a new run stays."""
        super().load_state_dict(state_dict)
        # It is empty where no scale was needed.
        if state_dict.get("grad_scaler"):
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])

    def _compute_losses(self, data: list[dict]) -> dict[str, Tensor]:
        autocast = torch.autocast(
            self._device_type, dtype=self._dtype, enabled=self._dtype is not None
        )
        with _kept_logits(self.model) as logits, autocast:
            losses = self.model(data)
        at_fault = _ranks_at_fault(losses)
        if not at_fault:
            return losses
        if comm.get_rank() in at_fault:
            bad = [f"{k} is {x.item()}" for k, x in losses.items() if not x.isfinite()]
            raise self._error(f"{', '.join(bad)}.\n{_describe_logits(logits)}", data)
        ranks = ", ".join(map(str, at_fault))
        raise self._error(f"a loss of rank {ranks} is not finite; its log says which.", data)

    def _check_gradients(self, data: list[dict]) -> None:
        """Raise if a gradient is not finite: clipping it would make NaN of every weight.

        All ranks have the same gradients here. The losses have just been read, so the device has
        nothing left to do and this costs no further wait.
        """
        if self.grad_scaler.is_enabled():
            return  # it passes over such a step itself, and tries a smaller scale
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
            "Weights and checkpoints are as they were. Look at the boxes of these images; lower "
            "SOLVER.BASE_LR or lengthen SOLVER.WARMUP_ITERS; and go on from the last checkpoint "
            "with --resume, or start anew."
        )


@contextlib.contextmanager
def _kept_logits(model: nn.Module) -> Iterator[list[Tensor]]:
    """Keep the class logits that the FCOS heads in ``model`` give inside the block."""
    kept: list[Tensor] = []
    # Not for good: a model with a hook of ours in it could not be copied or pickled.
    handles = [
        module.register_forward_hook(lambda _module, _inputs, output: kept.append(output[0]))
        for module in model.modules()
        if isinstance(module, FCOSHead)
    ]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def _ranks_at_fault(losses: dict[str, Tensor]) -> list[int]:
    """List the ranks that have a loss that is not finite; the same on all ranks.

    One wait for the device: these ranks are the only thing that is read from it.
    """
    finite = torch.stack([x.isfinite() for x in losses.values()]).all()
    flags = torch.zeros(comm.get_world_size(), device=finite.device)
    flags[comm.get_rank()] = ~finite
    if comm.get_world_size() > 1:
        torch.distributed.all_reduce(flags)
    return flags.nonzero().flatten().tolist()


def _describe_logits(logits: list[Tensor]) -> str:
    if not logits:
        return "The model has no FCOSHead whose logits could be looked at."
    values = torch.cat([x.detach().flatten().float() for x in logits])
    finite = values[values.isfinite()]
    largest = f"{finite.abs().max().item():.4g}" if len(finite) else "not finite"
    text = f"Largest absolute class logit of the head: {largest}"
    if len(finite) < len(values):
        text += f"; {len(values) - len(finite)} of {len(values)} are not finite"
    return f"{text}."
