"""Another library's FCOS and ours, with the same weights on the same images: how far apart."""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from detectron2.modeling import build_model
from detectron2.structures import Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from fcos_d2.checkpoint.architecture import build_cfg
from fcos_d2.checkpoint.convert import convert
from references import (
    HeadOutputs,
    Reference,
    Sample,
    build_reference,
    record_head,
    training_input,
)

_LIMIT = 100  # detections an image, of all libraries


@dataclasses.dataclass
class Parity:
    """Largest differences seen; 0 of nothing.

    Attributes:
        images: images whose detections were compared.
        outputs: of raw head outputs, relative (see :func:`relative_difference`).
        detections: detections of the reference.
        empty_boxes: boxes without area among the reference's, which torchvision keeps and we drop.
        unequal_images: images whose detections differ in number, class or order.
        boxes: of the detected boxes, in pixels.
        scores: of their scores.
        training_images: images whose losses were compared.
        losses: of the three losses, relative.
        gradients: of the gradients of the last layers' weights, relative.
    """

    images: int = 0
    outputs: float = 0.0
    detections: int = 0
    empty_boxes: int = 0
    unequal_images: int = 0
    boxes: float = 0.0
    scores: float = 0.0
    training_images: int = 0
    losses: float = 0.0
    gradients: float = 0.0

    def raise_to(self, name: str, value: float) -> None:
        """Keep the larger one; a value that is not a number is the largest."""
        setattr(self, name, math.inf if math.isnan(value) else max(getattr(self, name), value))


def compare_checkpoint(
    checkpoint: Mapping,
    source: str = "auto",
    image_batches: Iterable[Sequence[Tensor]] | None = None,
    training_batches: Iterable[Sequence[Sample]] | None = None,
) -> Parity:
    """Load a checkpoint into its library's own model and into ours, and compare all they give.

    Args:
        checkpoint: what the file holds, as :func:`fcos_d2.checkpoint.read_checkpoint` gives it.
        source: "torchvision", "detectron2" or "auto".
        image_batches: lists of RGB images (3, H, W), uint8, at the size that the networks see; by
            default noise of six sizes, in batches of 1 and 3.
        training_batches: lists of samples; by default 50 batches of noise with random boxes.

    Raises:
        ValueError: of another library, which can't be run beside ours.
        ImportError: Detectron2's own FCOS is asked for, but this version has none.
    """
    converted = convert(checkpoint, source)
    reference = build_reference(converted)
    num_classes = len(converted.class_indices)
    cfg = build_cfg(converted.cfg, num_classes)
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg).eval()
    model.load_state_dict(converted.weights, strict=False)
    parity = compare_detections(
        reference, model, random_image_batches() if image_batches is None else image_batches
    )
    if training_batches is None:
        training_batches = random_training_batches(num_classes)
    trained = compare_losses(reference, model, training_batches)
    return dataclasses.replace(
        parity,
        training_images=trained.training_images,
        losses=trained.losses,
        gradients=trained.gradients,
    )


@torch.no_grad()
def compare_detections(
    reference: Reference, model: nn.Module, batches: Iterable[Sequence[Tensor]]
) -> Parity:
    """Compare raw head outputs and detections.

    Args:
        reference: in evaluation mode.
        model: our FCOS with the same weights.
        batches: lists of RGB images (3, H, W), uint8, at the size that the networks see.
    """
    parity = Parity()
    ours = record_head(model.proposal_generator.head, lambda outputs: HeadOutputs(*outputs))
    for images in batches:
        expected = reference.detect(list(images))
        flip = model.input_format == "BGR"
        results = model([{"image": x.flip(0) if flip else x} for x in images])
        for got, wanted in zip(ours(), reference.head_outputs(), strict=True):
            parity.raise_to("outputs", relative_difference(got, wanted))
        for result, wanted in zip(results, expected, strict=True):
            _compare_instances(parity, result["instances"], wanted)
    return parity


def compare_losses(
    reference: Reference, model: nn.Module, batches: Iterable[Sequence[Sample]]
) -> Parity:
    """Compare the three losses, and the gradient of their sum in the last layers.

    Both models are left in training mode, batch norms in evaluation mode.
    """
    parity = Parity()
    head = model.proposal_generator.head
    pairs = list(
        zip([head.cls_score, head.box_pred, head.centerness], reference.predictors, strict=True)
    )
    for network in (model, reference.model):
        network.train().requires_grad_(False)
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
    for predictor in (predictor for pair in pairs for predictor in pair):
        predictor.requires_grad_(True)
    for samples in batches:
        parity.training_images += len(samples)
        wanted = reference.losses(list(samples))
        with EventStorage():
            got = list(model([training_input(x, model.input_format) for x in samples]).values())
        for one, other in zip(got, wanted, strict=True):
            parity.raise_to("losses", relative_difference(one.detach(), other.detach()))
        for one, other in pairs:
            gradients = (
                torch.autograd.grad(sum(losses), list(layer.parameters()), retain_graph=True)
                for losses, layer in ((got, one), (wanted, other))
            )
            for mine, theirs in zip(*gradients, strict=True):
                parity.raise_to("gradients", relative_difference(mine, theirs))
    return parity


def relative_difference(got: Tensor, wanted: Tensor) -> float:
    """Largest |got - wanted| / |wanted|; where |wanted| is below its mean, over the mean."""
    if got.shape != wanted.shape:
        raise ValueError(f"shapes differ: {tuple(got.shape)} and {tuple(wanted.shape)}")
    if not wanted.numel():
        return 0.0
    scale = wanted.abs()
    scale = scale.clamp(min=max(scale.mean().item(), 1e-12))
    return ((got - wanted).abs() / scale).max().item()


def random_image_batches() -> Iterator[list[Tensor]]:
    """Noise of six sizes: each alone, then with two smaller images beside it.

    Padded to multiples of 32, only one of them is a multiple of 128: on the others torchvision's
    locations of P6 and P7 are less than a stride apart.
    """
    generator = torch.Generator().manual_seed(0)

    def image(height: int, width: int) -> Tensor:
        return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)

    for height, width in [(96, 128), (128, 160), (200, 264), (256, 256), (320, 200), (70, 352)]:
        yield [image(height, width)]
        yield [image(height, width), image(height - 9, width), image(height // 2, width - 40)]


def random_training_batches(num_classes: int) -> Iterator[list[Sample]]:
    """50 batches of 1 to 3 images of noise, two of them large, with 0 to 60 boxes an image."""
    sizes = [(96, 128), (64, 96), (160, 96), (128, 128), (70, 200)]
    for k in range(50):
        size = sizes[k % 5] if k < 48 else (416, 544)
        yield random_samples(1 + k % 3 if k < 48 else 1, size, num_classes, seed=k)


def random_samples(count: int, size: tuple[int, int], num_classes: int, seed: int) -> list[Sample]:
    """Noise of one size with 0 to 60 boxes each, of all sizes and near the levels' bounds.

    What the other libraries match coarsely is not in it: coordinates are fractional, so that no
    distance meets a bound exactly, and no two areas in an image are within 16 square pixels, which
    1e8 - area in float32 may not tell apart.
    """
    generator = torch.Generator().manual_seed(seed)
    height, width = size
    samples = []
    for _ in range(count):
        num_boxes = (0, 1, 3, 10, 60)[torch.randint(5, (1,), generator=generator).item()]
        limit = torch.tensor([width, height])
        extent = 4 * (limit / 4) ** torch.rand(num_boxes, 2, generator=generator)
        # Every other box is as large as a bound is from some location, or a little more or less.
        near = torch.tensor([64.0, 128, 256, 512])
        near = near[torch.randint(4, (num_boxes, 2), generator=generator)]
        near = near * (1.0 + 0.3 * torch.rand(num_boxes, 2, generator=generator))
        extent[::2] = near[::2].minimum(limit - 1.0)
        corner = torch.rand(num_boxes, 2, generator=generator) * (limit - extent)
        boxes = torch.cat((corner, corner + extent), dim=1)
        boxes = boxes[_distinct(extent.prod(1), 16.0)]
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)
        classes = torch.randint(0, num_classes, (len(boxes),), generator=generator)
        samples.append(Sample(image, boxes, classes))
    return samples


def _distinct(values: Tensor, gap: float) -> list[int]:
    """Indices, in order, of values that are more than ``gap`` apart."""
    kept: list[int] = []
    largest = -math.inf
    for index in values.argsort().tolist():
        if values[index] > largest + gap:
            kept.append(index)
            largest = values[index].item()
    return sorted(kept)


def _compare_instances(parity: Parity, got: Instances, wanted: Instances) -> None:
    parity.images += 1
    parity.detections += len(wanted)
    has_area = wanted.pred_boxes.nonempty()
    parity.empty_boxes += int((~has_area).sum())
    if len(wanted) == _LIMIT:  # its empty boxes took places under the limit
        got = got[: int(has_area.sum())]
    wanted = wanted[has_area]
    if not torch.equal(got.pred_classes, wanted.pred_classes):
        parity.unequal_images += 1
        return
    if len(got):
        boxes = (got.pred_boxes.tensor - wanted.pred_boxes.tensor).abs().max().item()
        parity.raise_to("boxes", boxes)
        parity.raise_to("scores", (got.scores - wanted.scores).abs().max().item())
