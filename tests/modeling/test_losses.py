"""Box and quality losses and their sum: by hand, against torchvision, and numerical gradients."""

import math

import pytest
import torch
from torch.autograd import gradcheck
from torchvision import ops

from fcos_d2.modeling.losses import (
    BOX_LOSSES,
    LossOptions,
    binary_entropy,
    box_loss,
    centerness_targets,
    fcos_losses,
    iou_targets,
)


def random_distances(count, seed, low=0.1):
    generator = torch.Generator().manual_seed(seed)
    return low + 5 * torch.rand(count, 4, generator=generator, dtype=torch.float64)


def to_boxes(ltrb):
    return torch.cat((-ltrb[:, :2], ltrb[:, 2:]), dim=1)


@pytest.mark.parametrize(
    ("kind", "pred", "target", "expected"),
    [
        # 2 x 2 inside 4 x 2: intersection 4, union 8, hull 8, IoU 0.5.
        ("giou", [1.0, 1, 1, 1], [1.0, 1, 3, 1], 0.5),
        ("iou", [1.0, 1, 1, 1], [1.0, 1, 3, 1], math.log(2)),
        # Centres 1 apart, diagonal^2 of the hull 20: 0.5 + 1 / 20.
        ("diou", [1.0, 1, 1, 1], [1.0, 1, 3, 1], 0.55),
        # 1 x 3 and 3 x 1 crossing in one cell: intersection 1, union 5, hull 9.
        ("giou", [0.5, 1.5, 0.5, 1.5], [1.5, 0.5, 1.5, 0.5], 1 - 1 / 5 + 4 / 9),
    ],
)
def test_box_losses_by_hand(kind, pred, target, expected):
    loss = box_loss(torch.tensor([pred]), torch.tensor([target]), kind)
    assert loss.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    "kind, reference",
    [
        ("giou", ops.generalized_box_iou_loss),
        ("diou", ops.distance_box_iou_loss),
        ("ciou", ops.complete_box_iou_loss),
    ],
)
def test_box_losses_and_gradients_equal_torchvisions(kind, reference):
    pred = random_distances(200, 0).requires_grad_()
    other = pred.detach().clone().requires_grad_()
    target = random_distances(200, 1)
    ours = box_loss(pred, target, kind)
    theirs = reference(to_boxes(other), to_boxes(target))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    ours.sum().backward()
    theirs.sum().backward()
    torch.testing.assert_close(pred.grad, other.grad, rtol=1e-5, atol=1e-6)


def test_iou_equals_torchvisions():
    pred, target = random_distances(100, 0), random_distances(100, 1)
    iou = ops.box_iou(to_boxes(pred), to_boxes(target)).diagonal()
    torch.testing.assert_close(box_loss(pred, target, "iou"), -iou.log(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(iou_targets(pred, target), iou, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", BOX_LOSSES)
def test_empty_boxes(kind):
    """A predicted box of size 0 has a finite loss and gradient; no box gives no loss."""
    pred = torch.zeros(1, 4, requires_grad=True)
    loss = box_loss(pred, torch.ones(1, 4), kind)
    loss.sum().backward()
    assert loss.isfinite().all() and pred.grad.isfinite().all()
    assert box_loss(torch.zeros(0, 4), torch.zeros(0, 4), kind).shape == (0,)


def test_unknown_options():
    with pytest.raises(ValueError, match="BOX_LOSS is 'l1'"):
        box_loss(torch.ones(1, 4), torch.ones(1, 4), "l1")
    with pytest.raises(ValueError, match="BOX_LOSS is 'l1'"):
        LossOptions(box_loss="l1")
    with pytest.raises(ValueError, match="BOX_LOSS_WEIGHT is 'iou'"):
        LossOptions(box_loss_weight="iou")


def test_centerness_by_hand():
    """l 1, r 4, t 2, b 2: sqrt(1/4 * 2/2) = 0.5; in the middle it is 1."""
    ltrb = torch.tensor([[1.0, 2, 4, 2], [3, 3, 3, 3]])
    assert centerness_targets(ltrb).tolist() == [0.5, 1.0]


def test_binary_entropy_by_hand():
    """Entropy of a fair coin is ln 2; of a certain one 0."""
    entropy = binary_entropy(torch.tensor([0.5, 0.0, 1.0]))
    torch.testing.assert_close(entropy, torch.tensor([math.log(2), 0.0, 0.0]))


@pytest.mark.parametrize("kind", [k for k in BOX_LOSSES if k != "ciou"])
def test_gradcheck_of_box_losses(kind):
    pred = random_distances(6, 2).requires_grad_()
    assert gradcheck(lambda x: box_loss(x, random_distances(6, 3), kind), pred)


def test_gradcheck_of_ciou_with_its_constant_trade_off():
    """The trade-off factor takes no gradient, so the check holds it at its value."""
    pred, target = random_distances(6, 2).requires_grad_(), random_distances(6, 3)
    diou = box_loss(pred, target, "diou")

    def aspect(x):
        sizes = x[:, :2] + x[:, 2:]
        target_sizes = target[:, :2] + target[:, 2:]
        angle = torch.atan2(target_sizes[:, 0], target_sizes[:, 1]) - torch.atan2(
            sizes[:, 0], sizes[:, 1]
        )
        return 4 / math.pi**2 * angle.square()

    iou = (-box_loss(pred, target, "iou")).exp()
    trade_off = (aspect(pred) / (1 - iou + aspect(pred))).detach()
    expected = diou + trade_off * aspect(pred)
    (want,) = torch.autograd.grad(expected.sum(), pred, retain_graph=True)
    (got,) = torch.autograd.grad(box_loss(pred, target, "ciou").sum(), pred)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert gradcheck(lambda x: box_loss(x, target, "diou") + trade_off * aspect(x), pred)


def random_batch(num_classes=3, rows=40, dtype=torch.float64):
    labels = torch.randint(0, num_classes + 1, (rows,))
    positive = (labels < num_classes).nonzero().squeeze(1)
    return {
        "logits": torch.randn(rows, num_classes, dtype=dtype, requires_grad=True),
        "ltrb": random_distances(rows, 5).to(dtype).requires_grad_(),
        "quality": torch.randn(rows, dtype=dtype, requires_grad=True),
        "labels": labels,
        "positive": positive,
        "target_ltrb": random_distances(len(positive), 6).to(dtype),
    }


@pytest.mark.parametrize("weight", ["none", "centerness"])
def test_gradcheck_of_the_sum(weight):
    batch = random_batch(rows=8)
    names = ("logits", "ltrb", "quality")

    def total(*predictions):
        inputs = {**batch, **dict(zip(names, predictions, strict=True))}
        losses = fcos_losses(**inputs, options=LossOptions(box_loss_weight=weight))
        return losses.loss_cls + losses.loss_box + losses.loss_quality

    assert gradcheck(total, tuple(batch[name] for name in names))


# Two locations of one class with all logits 0, the first one positive; its prediction is 2 x 2.
ONE_POSITIVE = (
    torch.zeros(2, 1),
    torch.ones(2, 4),
    torch.zeros(2),
    torch.tensor([0, 1]),
    torch.tensor([0]),
    torch.tensor([[1.0, 1, 3, 1]]),
)


def test_sum_by_hand():
    """One positive of two locations, K = 1, all logits 0, prediction as in test_box_losses_by_hand.

    Targets l 1, t 1, r 3, b 1: centerness sqrt(1/3). One positive: nothing is divided.
    loss_cls 0.25 ln 2, loss_box 0.5, loss_ctr ln 2 (BCE at p = 0.5 for any target);
    its excess is ln 2 - H(sqrt(1/3)).
    """
    losses = fcos_losses(*ONE_POSITIVE)
    c = math.sqrt(1 / 3)
    entropy = -c * math.log(c) - (1 - c) * math.log(1 - c)
    assert losses.loss_cls.item() == pytest.approx(0.25 * math.log(2), rel=1e-5)
    assert losses.loss_box.item() == pytest.approx(0.5, rel=1e-5)
    assert losses.loss_quality.item() == pytest.approx(math.log(2), rel=1e-5)
    assert losses.num_pos.item() == 1
    assert losses.quality_excess.item() == pytest.approx(math.log(2) - entropy, rel=1e-5)


def test_centerness_weighting_by_hand():
    """Two positives, GIoU losses 0.5 and 0 and centerness sqrt(1/3) and 1.

    (0.5 * sqrt(1/3) + 0 * 1) / (sqrt(1/3) + 1).
    """
    losses = fcos_losses(
        torch.zeros(2, 1),
        torch.ones(2, 4),
        torch.zeros(2),
        torch.tensor([0, 0]),
        torch.tensor([0, 1]),
        torch.tensor([[1.0, 1, 3, 1], [1, 1, 1, 1]]),
        LossOptions(box_loss_weight="centerness"),
    )
    c = math.sqrt(1 / 3)
    assert losses.loss_box.item() == pytest.approx(0.5 * c / (c + 1), rel=1e-5)


def test_excess_is_zero_at_the_best_centerness():
    batch = random_batch()
    targets = centerness_targets(batch["target_ltrb"])
    batch["quality"] = torch.zeros(40, dtype=torch.float64)
    batch["quality"][batch["positive"]] = targets.logit()
    losses = fcos_losses(**batch)
    assert losses.quality_excess.item() == pytest.approx(0, abs=1e-6)
    assert losses.loss_quality.item() > 0.1


def test_no_positive_gives_zeros_that_keep_the_graph():
    logits, ltrb, centerness = (torch.randn(6, n, requires_grad=True) for n in (2, 4, 1))
    losses = fcos_losses(
        logits,
        ltrb,
        centerness[:, 0],
        torch.full((6,), 2),
        torch.zeros(0, dtype=torch.long),
        torch.zeros(0, 4),
    )
    assert losses.loss_box == 0 and losses.loss_quality == 0 and losses.loss_cls > 0
    (losses.loss_cls + losses.loss_box + losses.loss_quality).backward()
    assert (ltrb.grad == 0).all() and (centerness.grad == 0).all()


def test_losses_are_float32_under_autocast():
    batch = random_batch(dtype=torch.float32)
    half = {
        k: v.detach().bfloat16() if k in ("logits", "ltrb", "quality") else v
        for k, v in batch.items()
    }
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = fcos_losses(**half)
    rounded = {k: v.float() if v.dtype == torch.bfloat16 else v for k, v in half.items()}
    for got, expected in zip(losses, fcos_losses(**rounded), strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected)


def test_iou_quality_by_hand():
    """The prediction 2 x 2 in a box of 4 x 2: IoU 4 / 8. AdelaiDet's (4 + 1) / (8 + 1) is more.

    BCE of a logit of 1: ln(1 + e) - 0.5; its excess is that less H(0.5) = ln 2. By the quality the
    predicted box does not change.
    """
    logits, ltrb, _, labels, positive, target = ONE_POSITIVE
    ltrb = ltrb.clone().requires_grad_()
    quality = torch.ones(2, requires_grad=True)
    losses = fcos_losses(logits, ltrb, quality, labels, positive, target, LossOptions("iou"))
    expected = math.log(1 + math.e) - 0.5
    assert losses.loss_quality.item() == pytest.approx(expected, rel=1e-5)
    assert losses.quality_excess.item() == pytest.approx(expected - math.log(2), rel=1e-5)
    ltrb_grad, quality_grad = torch.autograd.grad(
        losses.loss_quality, (ltrb, quality), allow_unused=True
    )
    assert ltrb_grad is None
    assert quality_grad.tolist() == pytest.approx([1 / (1 + math.exp(-1)) - 0.5, 0], rel=1e-5)
    # Pixels or strides: the same quality.
    scaled = fcos_losses(
        logits, 16 * ltrb, quality, labels, positive, 16 * target, LossOptions("iou")
    )
    assert scaled.loss_quality.item() == pytest.approx(expected, rel=1e-5)


def test_without_quality():
    logits, ltrb, _, labels, positive, target = ONE_POSITIVE
    losses = fcos_losses(logits, ltrb, None, labels, positive, target)
    assert losses.loss_quality is None and losses.quality_excess is None
    assert losses.loss_box.item() == pytest.approx(0.5, rel=1e-5)


def test_the_normalizer_is_the_mean_over_ranks(monkeypatch):
    """This rank has 1 positive, another one 5: each divides by (1 + 5) / 2 = 3.

    The numbers are those of test_sum_by_hand and, for the centerness weighting, the sum of the
    weights is sqrt(1/3) here and 2 there: 0.5 sqrt(1/3) / ((sqrt(1/3) + 2) / 2).
    """
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
    other_rank = torch.tensor([5.0, 2.0])
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda values: values.add_(other_rank))
    losses = fcos_losses(*ONE_POSITIVE)
    assert losses.loss_cls.item() == pytest.approx(0.25 * math.log(2) / 3, rel=1e-5)
    assert losses.loss_box.item() == pytest.approx(0.5 / 3, rel=1e-5)
    assert losses.loss_quality.item() == pytest.approx(math.log(2) / 3, rel=1e-5)
    weighted = fcos_losses(*ONE_POSITIVE, LossOptions(box_loss_weight="centerness"))
    c = math.sqrt(1 / 3)
    assert weighted.loss_box.item() == pytest.approx(0.5 * c / ((c + 2) / 2), rel=1e-5)


def test_no_positive_on_any_of_two_ranks(monkeypatch):
    """One process would divide by 1; each of two divides by 1 / 2, and the gradients' mean is that.

    Two locations of one class with logit 0 and background: 2 * 0.75 * 0.25 * ln 2.
    """
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda values: values)
    nothing = torch.zeros(0, dtype=torch.long), torch.zeros(0, 4)
    losses = fcos_losses(
        torch.zeros(2, 1), torch.ones(2, 4), torch.zeros(2), torch.tensor([1, 1]), *nothing
    )
    assert losses.loss_cls.item() == pytest.approx(2 * 2 * 0.75 * 0.25 * math.log(2), rel=1e-5)
    assert losses.loss_box == losses.loss_quality == 0
