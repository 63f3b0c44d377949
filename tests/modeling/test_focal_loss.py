"""The focal loss in every layout and precision: by hand, against autograd and torchvision."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck
from torchvision import ops

from benchmark.measure import Job, peak_memory_cpu
from fcos_d2.modeling import focal_loss
from fcos_d2.modeling.focal_loss import sigmoid_focal_loss

# As the head makes them from maps with channels first, channels last, and with levels in between.
LAYOUTS = {
    "rows": lambda x: x,
    "channels first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "one level of several": lambda x: torch.cat((x, x), 1)[:, : x.shape[1]],
}


def random_case(images=3, rows=70, num_classes=5, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(images, rows, num_classes, generator=generator) - 2
    labels = torch.randint(-1, num_classes + 1, (images, rows), generator=generator)
    return logits.to(dtype), labels


def reference(logits, labels, alpha, gamma):
    """The definition over dense targets; autograd gives its gradient."""
    num_classes = logits.shape[-1]
    wanted = labels >= 0
    targets = F.one_hot(labels.clamp(min=0), num_classes + 1)[..., :-1].to(logits.dtype)
    p = logits.sigmoid()
    p_t = torch.where(targets == 1, p, 1 - p)
    loss = -((1 - p_t) ** gamma) * p_t.log()
    if alpha >= 0:
        loss = loss * torch.where(targets == 1, alpha, 1 - alpha)
    return (loss * wanted[..., None]).sum()


def test_by_hand():
    """Two rows, one class, logit 0, so p = 0.5 and -ln p = ln 2.

    Positive: 0.25 * 0.5^2 * ln 2; background: 0.75 * 0.5^2 * ln 2; the sum is 0.25 ln 2.
    """
    loss = sigmoid_focal_loss(torch.zeros(2, 1), torch.tensor([0, 1]))
    assert loss.item() == pytest.approx(0.25 * math.log(2), rel=1e-6)


def test_without_focus_it_is_cross_entropy():
    labels = torch.randint(0, 6, (50,))  # 5 is background
    logits = 3 * torch.randn(50, 5)
    one_hot = F.one_hot(labels, 6)[:, :5].float()
    expected = F.binary_cross_entropy_with_logits(logits, one_hot, reduction="sum")
    torch.testing.assert_close(sigmoid_focal_loss(logits, labels, alpha=-1, gamma=0), expected)


def test_ignored_rows_get_no_gradient():
    logits = torch.randn(3, 4, requires_grad=True)
    sigmoid_focal_loss(logits, torch.tensor([1, -1, 4])).backward()
    assert (logits.grad[1] == 0).all()
    assert (logits.grad[[0, 2]] != 0).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("alpha, gamma", [(0.25, 2.0), (-1.0, 2.0), (1.0, 1.5), (0.5, 0.5), (0, 0)])
def test_equals_the_definition(layout, alpha, gamma, monkeypatch):
    # Several chunks, the last of them shorter.
    monkeypatch.setattr(focal_loss, "_CHUNK", 16 * 5)
    logits, labels = random_case(dtype=torch.float64)
    other = logits.clone().requires_grad_()
    logits = LAYOUTS[layout](logits).requires_grad_()
    loss = sigmoid_focal_loss(logits, labels, alpha, gamma)
    expected = reference(other, labels, alpha, gamma)
    torch.testing.assert_close(loss, expected)
    (3 * loss).backward()
    (3 * expected).backward()
    torch.testing.assert_close(logits.grad, other.grad)


@pytest.mark.parametrize("rows", [0, 1, 70])
@pytest.mark.parametrize("num_classes", [1, 80])
def test_equals_torchvisions(rows, num_classes):
    logits, labels = random_case(2, rows, num_classes)
    labels = labels.where(labels >= 0, num_classes)
    logits, other = (logits.clone().requires_grad_() for _ in range(2))
    one_hot = F.one_hot(labels, num_classes + 1)[..., :-1].float()
    loss = sigmoid_focal_loss(logits, labels)
    expected = ops.sigmoid_focal_loss(other, one_hot, reduction="sum")
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(logits.grad, other.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("images", [(), (2,)])
def test_gradcheck(images):
    logits = torch.randn(*images, 7, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, 2, 3, 3, -1, 0]).expand(*images, 7)
    assert gradcheck(lambda x: sigmoid_focal_loss(x, labels), logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_the_gradient_once(dtype):
    """The gradient of an easy entry is 2e-9, which float16 has as 0; a loss scale of 2^16 helps."""
    logits = torch.full((1, 4, 3), -7.0, dtype=dtype, requires_grad=True)
    labels = torch.full((1, 4), 3)
    (2**16 * sigmoid_focal_loss(logits, labels)).backward()
    other = logits.detach().double().requires_grad_()
    (2**16 * reference(other, labels, 0.25, 2.0)).backward()
    assert logits.grad.dtype == dtype and (logits.grad > 0).all()
    torch.testing.assert_close(logits.grad.double(), other.grad, rtol=4e-3, atol=0)


def test_gradient_is_accurate_for_easy_entries_too():
    """Relative error below 2e-6: nearly all entries are easy, and 1 - p alone is off by 6e-8."""
    logits = torch.linspace(-16, 16, 4001)[None, :, None].requires_grad_()
    labels = torch.arange(4001)[None] % 2  # one class, so 1 is background
    sigmoid_focal_loss(logits, labels).backward()
    other = logits.detach().double().requires_grad_()
    # -ln(1 - p) without the rounding of 1 - p.
    sign = 1 - 2.0 * (labels == 0)[..., None]
    p, s = (sign * other).sigmoid(), F.softplus(sign * other, threshold=100)
    (torch.where(labels == 0, 0.25, 0.75)[..., None] * p**2 * s).sum().backward()
    torch.testing.assert_close(logits.grad.double(), other.grad, rtol=2e-6, atol=0)


def test_logits_of_any_size():
    """Wrong by 200: (1 - 0.25) * 200 + 0.25 * 200, where 1 - p is 0 in float32; right: no loss."""
    logits = torch.tensor([[200.0, -200.0], [200.0, -200.0]], requires_grad=True)
    loss = sigmoid_focal_loss(logits, torch.tensor([1, 0]))
    loss.backward()
    assert loss.item() == pytest.approx(200.0)
    # d/dx of 0.75 * softplus(x) and of 0.25 * softplus(-x).
    assert logits.grad.flatten().tolist() == pytest.approx([0.75, -0.25, 0, 0], abs=1e-6)


def test_a_logit_that_is_not_a_number_shows():
    logits, labels = random_case()
    logits[1, 2, 3] = math.nan
    labels[1, 2] = 0
    assert sigmoid_focal_loss(logits, labels).isnan()


def test_memory_is_that_of_the_gradients():
    """4 x 20000 x 20 logits are 6.1 MiB, as are the saved and the returned gradient.

    The rest is chunks, labels (4 x 20000) and their entries.
    """
    logits, labels = random_case(4, 20_000, 20)
    logits.requires_grad_()
    size = logits.numel() * 4

    def run():
        sigmoid_focal_loss(logits, labels).backward()
        logits.grad = None

    assert 2 * size <= peak_memory_cpu(Job("focal loss", run)) < 2 * size + size / 2
