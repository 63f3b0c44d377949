"""The focal loss in one kernel, for CUDA devices."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS, _CLASSES = 64, 32  # of one block


def focal_loss_triton(
    logits: Tensor, labels: Tensor, grad: Tensor, weights: tuple[float, float], gamma: float
) -> Tensor:
    """Return the sum and fill ``grad``; see :func:`fcos_d2.modeling.losses.sigmoid_focal_loss`.

    Args:
        logits: (R, K) or (N, L, K), float32 or half precision, with any strides.
        labels: (R,) or (N, L).
        grad: float32, the shape of ``logits``.
        weights: of the entries of the row's class, and of all others.
        gamma: exponent of the modulating factor.
    """
    if logits.dim() == 2:
        logits, labels, grad = logits[None], labels[None], grad[None]
    images, rows, num_classes = logits.shape
    labels = labels.contiguous()
    blocks = (triton.cdiv(rows, _ROWS), images)
    # A sum for each block, then their sum: atomic additions would come in any order.
    partial = torch.zeros(images, blocks[0], device=logits.device)
    if logits.numel():
        _kernel[blocks](
            logits,
            labels,
            grad,
            partial,
            rows,
            num_classes,
            *logits.stride(),
            *grad.stride(),
            WEIGHT_OF_CLASS=weights[0],
            WEIGHT=weights[1],
            GAMMA=float(gamma),
            ROWS=_ROWS,
            CLASSES=_CLASSES,
        )
    return partial.sum()


@triton.jit
def _kernel(
    logits,
    labels,
    grad,
    partial,
    rows,
    num_classes,
    stride_image,
    stride_row,
    stride_class,
    grad_image,
    grad_row,
    grad_class,
    WEIGHT_OF_CLASS: tl.constexpr,
    WEIGHT: tl.constexpr,
    GAMMA: tl.constexpr,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    label = tl.load(labels + image * rows + row, mask=row < rows, other=-1)
    total = tl.zeros((ROWS, CLASSES), dtype=tl.float32)
    for start in range(0, num_classes, CLASSES):
        column = start + tl.arange(0, CLASSES)
        inside = (row < rows)[:, None] & (column < num_classes)[None, :]
        place = image * stride_image + row[:, None] * stride_row + column[None, :] * stride_class
        x = tl.load(logits + place, mask=inside, other=0.0).to(tl.float32)
        positive = label[:, None] == column[None, :]
        # An entry of the row's class is a background entry of the negated logit.
        z = tl.where(positive, -x, x)
        e = tl.exp(-tl.abs(z))
        p = tl.where(z > 0, 1.0, e) / (1.0 + e)
        q = tl.where(z > 0, e, 1.0) / (1.0 + e)
        # ln(1 + e), with the rounding of 1 + e taken out again.
        u = 1.0 + e
        s = tl.maximum(z, 0.0) + tl.where(u == 1.0, e, tl.log(u) * (e / (u - 1.0)))
        if GAMMA == 2.0:
            factor = p * p
        elif GAMMA == 0.0:
            factor = tl.full((ROWS, CLASSES), 1.0, dtype=tl.float32)
        else:
            factor = tl.exp(GAMMA * tl.log(tl.maximum(p, 1e-37)))
        factor *= tl.where(positive, WEIGHT_OF_CLASS, WEIGHT)
        factor = tl.where(inside & (label >= 0)[:, None], factor, 0.0)
        total += factor * s
        slope = factor * (GAMMA * q * s + p)
        place = image * grad_image + row[:, None] * grad_row + column[None, :] * grad_class
        tl.store(grad + place, tl.where(positive, -slope, slope), mask=inside)
    block = image * tl.num_programs(0) + tl.program_id(0)
    tl.store(partial + block, tl.sum(total))
