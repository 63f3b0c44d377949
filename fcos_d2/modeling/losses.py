"""The three losses of FCOS.

Boxes are given by their distances (l, t, r, b) from the location that prediction and target share,
in any unit: the box losses are invariant to scale. (torchvision.ops has the same losses on corners;
its GIoU and CIoU differ from these in the last bits of float32, which resumed trainings would see.)
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from detectron2.utils import comm
from torch import Tensor

from ..config import check_option
from .focal_loss import sigmoid_focal_loss

BOX_LOSSES = ("giou", "iou", "diou", "ciou")
_EPS = 1e-7


def box_loss(pred: Tensor, target: Tensor, kind: str = "giou") -> Tensor:
    """Loss (P,) of each predicted box against its target.

    Args:
        pred: (P, 4) distances l, t, r, b, not negative.
        target: (P, 4), positive.
        kind: "iou" is -ln IoU (FCOS, equation 2, after UnitBox), "giou" is 1 - GIoU (Rezatofighi
            et al. 2019), "diou" and "ciou" are 1 - DIoU and 1 - CIoU (Zheng et al. 2020).

    Raises:
        ValueError: unknown kind.
    """
    check_option("MODEL.FCOS.BOX_LOSS", kind, BOX_LOSSES)
    iou, union = _iou_and_union(pred, target)
    if kind == "iou":
        return -iou.clamp(min=_EPS).log()
    hull_size = _size(torch.maximum(pred, target))
    if kind == "giou":
        hull_area = hull_size.prod(1)
        return 1 - iou + (hull_area - union) / (hull_area + _EPS)

    center_offset = ((pred[:, 2:] - pred[:, :2]) - (target[:, 2:] - target[:, :2])) / 2
    distance = center_offset.square().sum(1) / (hull_size.square().sum(1) + _EPS)
    loss = 1 - iou + distance
    if kind == "diou":
        return loss
    pred_size, target_size = _size(pred), _size(target)
    angle = torch.atan(target_size[:, 0] / target_size[:, 1]) - torch.atan(
        pred_size[:, 0] / (pred_size[:, 1] + _EPS)
    )
    v = 4 / math.pi**2 * angle.square()
    with torch.no_grad():  # constant in the paper as well
        trade_off = v / (1 - iou + v + _EPS)
    return loss + trade_off * v


def _size(ltrb: Tensor) -> Tensor:
    """Width and height (P, 2) of boxes (P, 4)."""
    return ltrb[:, :2] + ltrb[:, 2:]


def _iou_and_union(pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    # Both boxes contain the location, so they overlap by the smaller distance on each side.
    intersection = _size(torch.minimum(pred, target)).prod(1)
    union = _size(pred).prod(1) + _size(target).prod(1) - intersection
    return intersection / (union + _EPS), union


def iou_targets(pred: Tensor, target: Tensor) -> Tensor:
    """IoU (P,) of predicted boxes with their targets, both (P, 4), without a gradient.

    AdelaiDet adds 1 square stride to intersection and union, which favours small boxes.
    """
    with torch.no_grad():
        return _iou_and_union(pred, target)[0]


def centerness_targets(ltrb: Tensor) -> Tensor:
    """Centerness of locations in their boxes (FCOS, equation 3): (P, 4) positive -> (P,) in (0, 1].

    sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b)), without a gradient.
    """
    with torch.no_grad():
        near = torch.minimum(ltrb[:, :2], ltrb[:, 2:])
        far = torch.maximum(ltrb[:, :2], ltrb[:, 2:])
        return (near / far).prod(1).sqrt()


def binary_entropy(p: Tensor) -> Tensor:
    """Entropy in nats of Bernoulli variables, elementwise: the minimum of BCE for targets ``p``."""
    return -(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p))


@dataclass(frozen=True)
class LossOptions:
    """Choices of the losses.

    Attributes:
        quality: target of the quality branch, "centerness" or "iou".
        box_loss: see :func:`box_loss`.
        box_loss_weight: weight of each positive's box loss: "none" or its "centerness" target.
        alpha: see :func:`sigmoid_focal_loss`.
        gamma: see :func:`sigmoid_focal_loss`.

    Raises:
        ValueError: an unknown box loss or weight.
    """

    quality: str = "centerness"
    box_loss: str = "giou"
    box_loss_weight: str = "none"
    alpha: float = 0.25
    gamma: float = 2.0

    def __post_init__(self) -> None:
        check_option("MODEL.FCOS.BOX_LOSS", self.box_loss, BOX_LOSSES)
        check_option("MODEL.FCOS.BOX_LOSS_WEIGHT", self.box_loss_weight, ("none", "centerness"))


class FCOSLosses(NamedTuple):
    """The losses of one batch and metrics that explain them.

    Attributes:
        loss_cls: focal loss.
        loss_box: box loss.
        loss_quality: binary cross entropy of the quality; None without a quality branch.
        num_pos: number of positive locations on this rank.
        quality_excess: ``loss_quality`` minus the entropy of its targets, which is its minimum.
    """

    loss_cls: Tensor
    loss_box: Tensor
    loss_quality: Tensor | None
    num_pos: Tensor
    quality_excess: Tensor | None


def fcos_losses(
    logits: Tensor,
    ltrb: Tensor,
    quality: Tensor | None,
    labels: Tensor,
    positive: Tensor | tuple[Tensor, ...],
    target_ltrb: Tensor,
    options: LossOptions = LossOptions(),
) -> FCOSLosses:
    """Sum the losses of a batch (FCOS, equation 2), in float32 or better even under autocast.

    Each is divided by the number of positives of all ranks, at least 1, and multiplied by the
    number of ranks: DistributedDataParallel averages gradients over ranks, which then equal those
    of one process with the whole batch. With ``box_loss_weight="centerness"`` the sum of the box
    losses is divided by the sum of the weights instead, likewise over all ranks.

    Args:
        logits: (N, L, K), or (R, K) with the locations of all images concatenated.
        ltrb: (N, L, 4) or (R, 4) predicted distances in strides.
        quality: (N, L) or (R,) logits; None without a quality branch.
        labels: (N, L) or (R,) int64: class, K for background, -1 for ignored.
        positive: indices of the P positives: images and locations, (P,) each, or rows (P,).
        target_ltrb: (P, 4) their target distances in strides.
        options: choices of the losses.
    """
    with torch.autocast(logits.device.type, enabled=False):
        target_ltrb = _at_least_float32(target_ltrb)
        pred_ltrb = _at_least_float32(ltrb[positive])
        ctr_targets = centerness_targets(target_ltrb)
        num_pos = target_ltrb.new_full((), len(target_ltrb))
        totals = torch.stack((num_pos, ctr_targets.sum())).float()
        if comm.get_world_size() > 1:
            torch.distributed.all_reduce(totals)
        total_pos, total_weight = totals.unbind()
        # The minimum applies to the total: with a minimum of 1 per rank, two ranks without a
        # positive would have half the gradient of one process.
        normalizer = total_pos.clamp(min=1.0) / comm.get_world_size()
        loss_cls = sigmoid_focal_loss(logits, labels, options.alpha, options.gamma) / normalizer
        box_losses = box_loss(pred_ltrb, target_ltrb, options.box_loss)
        if options.box_loss_weight == "centerness":
            mean_weight = total_weight.clamp(min=_EPS) / comm.get_world_size()
            loss_box = (box_losses * ctr_targets).sum() / mean_weight
        else:
            loss_box = box_losses.sum() / normalizer
        if quality is None:
            return FCOSLosses(loss_cls, loss_box, None, num_pos, None)
        targets = (
            ctr_targets if options.quality == "centerness" else iou_targets(pred_ltrb, target_ltrb)
        )
        loss_quality = F.binary_cross_entropy_with_logits(
            _at_least_float32(quality[positive]), targets, reduction="sum"
        )
        loss_quality = loss_quality / normalizer
        excess = loss_quality.detach() - binary_entropy(targets).sum() / normalizer
    return FCOSLosses(loss_cls, loss_box, loss_quality, num_pos, excess)


def _at_least_float32(x: Tensor) -> Tensor:
    """Convert half precision to float32; return float32 and float64 unchanged."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
