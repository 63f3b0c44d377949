"""The focal loss of every layout, precision and kernel against autograd and torchvision."""

import math
import os
import subprocess
import sys
import textwrap

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


def test_gradcheck_with_images():
    logits, labels = random_case(2, 4, 3, torch.float64)
    assert gradcheck(lambda x: sigmoid_focal_loss(x, labels), logits.requires_grad_())


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


def accuracy_case():
    logits = torch.linspace(-16, 16, 4001)[None, :, None]
    labels = torch.arange(4001)[None] % 2  # of one class, so 1 is background
    other = logits.double().requires_grad_()
    # -ln(1 - p) without the rounding of 1 - p.
    sign = 1 - 2.0 * (labels == 0)[..., None]
    p, s = (sign * other).sigmoid(), F.softplus(sign * other, threshold=100)
    (torch.where(labels == 0, 0.25, 0.75)[..., None] * p**2 * s).sum().backward()
    return logits, labels, other.grad


def test_gradient_is_accurate_for_easy_entries_too():
    """Each to 2e-6 of itself: nearly all entries are easy, and 1 - p alone is off by up to 6e-8."""
    logits, labels, expected = accuracy_case()
    logits.requires_grad_()
    sigmoid_focal_loss(logits, labels).backward()
    torch.testing.assert_close(logits.grad.double(), expected, rtol=2e-6, atol=0)


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
    """4 x 20000 x 20 logits are 6.1 MiB; the saved gradient and the one that goes on are as large.

    What else there is: chunks, and columns of the labels (4 x 20000) and of their entries.
    """
    logits, labels = random_case(4, 20_000, 20)
    logits.requires_grad_()
    size = logits.numel() * 4

    def run():
        sigmoid_focal_loss(logits, labels).backward()
        logits.grad = None

    assert 2 * size <= peak_memory_cpu(Job("focal loss", run)) < 2 * size + size / 2


TRITON_CASES = """
    import sys
    sys.path.insert(0, {folder!r})
    import torch
    from test_focal_loss import LAYOUTS, accuracy_case, random_case, reference
    from fcos_d2.modeling.focal_loss_triton import focal_loss_triton

    for images, rows, num_classes in [(2, 70, 5), (1, 64, 33), (2, 1, 1), (2, 0, 3)]:
        for layout in LAYOUTS.values():
            for alpha, gamma in [(0.25, 2.0), (-1.0, 1.5), (0.5, 0.0)]:
                logits, labels = random_case(images, rows, num_classes)
                logits = layout(logits)
                weights = (alpha, 1 - alpha) if alpha >= 0 else (1.0, 1.0)
                grad = torch.empty_like(logits)
                loss = focal_loss_triton(logits, labels, grad, weights, gamma)
                other = logits.double().requires_grad_()
                expected = reference(other, labels, alpha, gamma)
                expected.backward()
                torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(grad.double(), other.grad, rtol=1e-5, atol=1e-6)
    # Rows without images, and logits in half precision.
    logits, labels = random_case(1, 70, 5, torch.bfloat16)
    grad = torch.empty(70, 5)
    loss = focal_loss_triton(logits[0], labels[0], grad, (0.25, 0.75), 2.0)
    other = logits[0].double().requires_grad_()
    reference(other, labels[0], 0.25, 2.0).backward()
    torch.testing.assert_close(grad.double(), other.grad, rtol=1e-5, atol=1e-6)
    logits, labels, expected = accuracy_case()
    grad = torch.empty_like(logits)
    focal_loss_triton(logits, labels, grad, (0.25, 0.75), 2.0)
    torch.testing.assert_close(grad.double(), expected, rtol=2e-6, atol=0)
    print("equal")
"""


def test_triton_kernel_in_its_interpreter():
    """What runs on CUDA devices, interpreted on the CPU: Triton has to be told at its import."""
    pytest.importorskip("triton", reason="PyTorch brings Triton for CUDA on Linux only")
    code = textwrap.dedent(TRITON_CASES.format(folder=os.path.dirname(__file__)))
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert result.stdout == "equal\n", result.stderr


def test_triton_kernel_compiles_for_cuda():
    """To machine code of compute capability 9.0, which takes no device."""
    triton = pytest.importorskip("triton", reason="PyTorch brings Triton for CUDA on Linux only")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fcos_d2.modeling.focal_loss_triton import _kernel

    constants = {"WEIGHT_OF_CLASS": 0.25, "WEIGHT": 0.75, "ROWS": 64, "CLASSES": 32}
    for dtype, gamma in [("fp32", 2.0), ("bf16", 1.5), ("fp16", 0.0)]:
        values = {**constants, "GAMMA": gamma, "stride_row": 1, "grad_row": 1}
        types = {"logits": f"*{dtype}", "labels": "*i64", "grad": "*fp32", "partial": "*fp32"}
        signature = {
            name: "constexpr" if name in values else types.get(name, "i32")
            for name in _kernel.arg_names
        }
        kernel = triton.compile(
            ASTSource(fn=_kernel, signature=signature, constexprs=values),
            target=GPUTarget("cuda", 90, 32),
        )
        assert len(kernel.asm["cubin"]) > 1000
