"""The focal loss over dense logits: value and closed-form gradient in one pass."""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def sigmoid_focal_loss(
    logits: Tensor, labels: Tensor, alpha: float = 0.25, gamma: float = 2.0
) -> Tensor:
    """Sigmoid focal loss, summed (Lin et al. 2017, equation 5), in float32 or better.

    With p the probability and s = softplus(x) = -ln(1 - p), a background entry has the loss
    (1 - alpha) p^gamma s and the gradient (1 - alpha) p^gamma (gamma (1 - p) s + p); an entry of
    the row's class has the same of -x with alpha, the gradient negated. Both are computed at once
    from the logits as they lie in memory, and only the gradient is kept: no targets, no copy.

    Args:
        logits: (R, K) or (N, L, K), before the sigmoid, with any strides.
        labels: (R,) or (N, L) int64: class 0..K-1, K for background, -1 for a row that takes no
            part.
        alpha: weight of the positive class, 1 - alpha of the others; negative is no weighting.
        gamma: exponent of the modulating factor.
    """
    weights = (alpha, 1 - alpha) if alpha >= 0 else (1.0, 1.0)
    return _SigmoidFocalLoss.apply(logits, labels, weights, gamma)


class _SigmoidFocalLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, weights, gamma):
        half = logits.dtype in (torch.float16, torch.bfloat16)
        # Not in half precision: before it is scaled, the gradient of most entries is below what
        # float16 can hold.
        grad = torch.empty_like(logits, dtype=torch.float32 if half else logits.dtype)
        on_cuda = logits.is_cuda and grad.dtype == torch.float32
        compute = _cuda_kernel() if on_cuda else _focal_loss_torch
        loss = compute(logits, labels, grad, weights, gamma)
        ctx.save_for_backward(grad)
        ctx.dtype = logits.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        (grad,) = ctx.saved_tensors
        result = torch.empty_like(grad, dtype=ctx.dtype)
        return torch.mul(grad, grad_output, out=result), None, None, None


@functools.cache
def _cuda_kernel() -> Callable:
    """Return Triton's, which comes with PyTorch's CUDA builds for Linux; else the one below."""
    try:
        from .focal_loss_triton import focal_loss_triton
    except ImportError:
        return _focal_loss_torch
    return focal_loss_triton


def _focal_loss_torch(
    logits: Tensor, labels: Tensor, grad: Tensor, weights: tuple[float, float], gamma: float
) -> Tensor:
    """Return the sum and fill ``grad``: every entry as background, then those of a class."""
    total = grad.new_zeros(())
    row_weights = (labels >= 0).to(grad.dtype).mul_(weights[1])[..., None]
    for chunk in _chunks(logits):
        x = logits[chunk].to(grad.dtype)
        total += _background(x, row_weights[chunk], gamma, grad[chunk])

    num_classes = logits.shape[-1]
    column = labels.clamp(0, num_classes - 1)[..., None]
    positive = ((labels >= 0) & (labels < num_classes))[..., None]
    x = logits.gather(-1, column).to(grad.dtype)
    loss, _ = _entries(x, weights[1], gamma)
    loss_of_class, slope_of_class = _entries(-x, weights[0], gamma)
    total += torch.where(positive, loss_of_class - loss, 0.0).sum()
    kept = grad.gather(-1, column)
    grad.scatter_(-1, column, torch.where(positive, -slope_of_class, kept))
    return total


# Entries of a chunk, which bounds the memory (7 MiB in float32) of the passes below.
_CHUNK = 1 << 18


def _chunks(logits: Tensor) -> Iterator[tuple]:
    """Yield indices of chunks of rows; on other devices than the CPU of all rows at once."""
    if logits.device.type != "cpu":
        yield (...,)
        return
    rows = max(1, _CHUNK // logits.shape[-1])
    for start in range(0, logits.shape[-2], rows):
        chunk = slice(start, start + rows)
        if logits.dim() == 2:
            yield (chunk,)
        else:
            yield from ((image, chunk) for image in range(len(logits)))


def _background(x: Tensor, weights: Tensor, gamma: float, grad: Tensor) -> Tensor:
    """As :func:`_entries` for rows (.., K) with weights (.., 1); fill ``grad``, return the sum."""
    p, q, s = _probabilities(x)
    factor = (p * p if gamma == 2 else p.pow(gamma)).mul_(weights)
    loss = (factor * s).sum()
    slope = q.mul_(s)
    torch.add(p, slope, alpha=gamma, out=slope)
    torch.mul(factor, slope, out=grad)
    return loss


def _entries(x: Tensor, weight: float, gamma: float) -> tuple[Tensor, Tensor]:
    """Loss and gradient of background entries of logits ``x``."""
    p, q, s = _probabilities(x)
    factor = weight * p.pow(gamma)
    return factor * s, factor * (gamma * q * s + p)


def _probabilities(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return p, 1 - p and softplus(x) = -ln(1 - p).

    PyTorch's own softplus takes three times as long on the CPU. q, which stands for 1 - p, is
    rounded; p / (1 - q), which would be 1, takes the error out of the logarithm again.
    """
    tiny = torch.finfo(x.dtype).tiny
    p, q = x.sigmoid(), (-x).sigmoid()
    s = q.clamp(min=tiny).log_().neg_().mul_(p).div_((1 - q).clamp_(min=tiny))
    # softplus(x) > x, which it equals where q has no digits left.
    return p, q, torch.maximum(s, x, out=s)
