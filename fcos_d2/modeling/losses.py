"""The three losses of FCOS: small pure functions, then their sum.

Boxes are given by their distances (l, t, r, b) from one location that prediction and target share.
The unit is free: every box loss is the same whatever the distances are measured in.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from detectron2.utils import comm
from torch import Tensor

BOX_LOSSES = ("giou", "iou", "diou", "ciou")
_EPS = 1e-7


def sigmoid_focal_loss(
    logits: Tensor, labels: Tensor, alpha: float = 0.25, gamma: float = 2.0
) -> Tensor:
    """Sigmoid focal loss, summed (Lin et al. 2017, equation 5).

    Args:
        logits: (R, K), before the sigmoid.
        labels: (R,) int64: class 0..K-1, K for background, -1 for a row that takes no part.
        alpha: weight of the positive class, 1 - alpha of the others; negative is no weighting.
        gamma: exponent of the modulating factor.
    """
    num_classes = logits.shape[1]
    classes = torch.arange(num_classes, device=logits.device)
    targets = (labels[:, None] == classes).to(logits.dtype)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    p = logits.sigmoid()
    # 1 - p_t; at 0 an exponent below 1 would have an infinite slope.
    miss = (p + targets - 2 * p * targets).clamp(min=_EPS)
    loss = cross_entropy * miss**gamma
    if alpha >= 0:
        loss = loss * (alpha * targets + (1 - alpha) * (1 - targets))
    return (loss * (labels >= 0)[:, None]).sum()


def box_loss(pred: Tensor, target: Tensor, kind: str = "giou") -> Tensor:
    """Loss of each predicted box against its target, from distances to one common location.

    Args:
        pred: (P, 4) distances l, t, r, b, not negative.
        target: (P, 4), positive.
        kind: "iou" is -ln IoU (FCOS, equation 2, after UnitBox), "giou" is 1 - GIoU (Rezatofighi
            et al. 2019), "diou" and "ciou" are 1 - DIoU and 1 - CIoU (Zheng et al. 2020).

    Returns:
        (P,), one loss a box.

    Raises:
        ValueError: unknown kind.
    """
    if kind not in BOX_LOSSES:
        raise ValueError(f"MODEL.FCOS.BOX_LOSS is {kind!r}; it has to be one of {BOX_LOSSES}.")
    pred_size = pred[:, :2] + pred[:, 2:]  # (P, 2): width, height
    target_size = target[:, :2] + target[:, 2:]
    # Both boxes contain the location, so the sides overlap from it in each direction.
    overlap = torch.minimum(pred, target)
    hull = torch.maximum(pred, target)
    overlap_size = overlap[:, :2] + overlap[:, 2:]
    hull_size = hull[:, :2] + hull[:, 2:]
    intersection = overlap_size.prod(1)
    union = pred_size.prod(1) + target_size.prod(1) - intersection
    iou = intersection / (union + _EPS)
    if kind == "iou":
        return -iou.clamp(min=_EPS).log()
    if kind == "giou":
        hull_area = hull_size.prod(1)
        return 1 - iou + (hull_area - union) / (hull_area + _EPS)

    center_offset = ((pred[:, 2:] - pred[:, :2]) - (target[:, 2:] - target[:, :2])) / 2
    distance = center_offset.square().sum(1) / (hull_size.square().sum(1) + _EPS)
    loss = 1 - iou + distance
    if kind == "diou":
        return loss
    angle = torch.atan(target_size[:, 0] / target_size[:, 1]) - torch.atan(
        pred_size[:, 0] / (pred_size[:, 1] + _EPS)
    )
    v = 4 / math.pi**2 * angle.square()
    with torch.no_grad():  # the paper treats the trade-off as a constant
        trade_off = v / (1 - iou + v + _EPS)
    return loss + trade_off * v


def centerness_targets(ltrb: Tensor) -> Tensor:
    """Centerness of locations in their boxes (FCOS, equation 3): (P, 4) positive -> (P,) in (0, 1].

    sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b)), without a gradient.
    """
    with torch.no_grad():
        near = torch.minimum(ltrb[:, :2], ltrb[:, 2:])
        far = torch.maximum(ltrb[:, :2], ltrb[:, 2:])
        return (near / far).prod(1).sqrt()


def centerness_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross entropy of centerness, summed: logits (P,), targets (P,) in [0, 1]."""
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="sum")


def binary_entropy(p: Tensor) -> Tensor:
    """Entropy in nats of Bernoulli variables, elementwise: the least that BCE can be for ``p``."""
    return -(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p))


class FCOSLosses(NamedTuple):
    """The losses of one batch, and what explains them.

    Attributes:
        loss_cls: focal loss.
        loss_box: loss of the boxes.
        loss_ctr: BCE of the centerness.
        num_pos: number of positive locations on this rank.
        ctr_excess: ``loss_ctr`` less the entropy of its targets, the part that can reach 0.
    """

    loss_cls: Tensor
    loss_box: Tensor
    loss_ctr: Tensor
    num_pos: Tensor
    ctr_excess: Tensor


def fcos_losses(
    logits: Tensor,
    ltrb: Tensor,
    centerness: Tensor,
    labels: Tensor,
    positive: Tensor,
    target_ltrb: Tensor,
    *,
    box_loss_kind: str = "giou",
    box_loss_weight: str = "none",
    alpha: float = 0.25,
    gamma: float = 2.0,
) -> FCOSLosses:
    """Sum the losses of a batch (FCOS, equation 2), in float32 or better whatever autocast says.

    Each is divided by the number of positives averaged over all ranks, floor 1. With
    ``box_loss_weight="centerness"`` each box is weighted by its centerness target and the sum
    divided by the sum of the weights averaged over all ranks.

    Args:
        logits: (R, K), R being all locations of all images.
        ltrb: (R, 4) predicted distances in strides.
        centerness: (R,) logits.
        labels: (R,) int64: class, K for background, -1 for ignored.
        positive: (P,) rows of the positives.
        target_ltrb: (P, 4) target distances in strides of those rows.
        box_loss_kind: see :func:`box_loss`.
        box_loss_weight: "none" or "centerness".
        alpha: see :func:`sigmoid_focal_loss`.
        gamma: see :func:`sigmoid_focal_loss`.
    """
    num_pos = torch.as_tensor(float(len(positive)), device=logits.device)
    with torch.autocast(logits.device.type, enabled=False):
        ctr_targets = centerness_targets(_at_least_float32(target_ltrb))
        box_losses = box_loss(
            _at_least_float32(ltrb[positive]), _at_least_float32(target_ltrb), box_loss_kind
        )
        num_pos_mean, weight_mean = _mean_over_ranks(
            torch.stack((num_pos, ctr_targets.sum().float()))
        ).unbind()
        normalizer = num_pos_mean.clamp(min=1.0)
        loss_cls = sigmoid_focal_loss(_at_least_float32(logits), labels, alpha, gamma) / normalizer
        loss_ctr = (
            centerness_loss(_at_least_float32(centerness[positive]), ctr_targets) / normalizer
        )
        if box_loss_weight == "centerness":
            loss_box = (box_losses * ctr_targets).sum() / weight_mean.clamp(min=_EPS)
        else:
            loss_box = box_losses.sum() / normalizer
        ctr_excess = loss_ctr.detach() - binary_entropy(ctr_targets).sum() / normalizer
    return FCOSLosses(loss_cls, loss_box, loss_ctr, num_pos, ctr_excess)


def _mean_over_ranks(values: Tensor) -> Tensor:
    if comm.get_world_size() > 1:
        values = values.clone()
        torch.distributed.all_reduce(values)
        values = values / comm.get_world_size()
    return values


def _at_least_float32(x: Tensor) -> Tensor:
    """Half precision to float32; float32 and float64 as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
