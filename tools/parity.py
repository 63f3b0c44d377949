"""Parity of fcos_d2 with another library's FCOS: the same weights on the same images."""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from fcos_d2.checkpoint.convert import convert
from peers import Peer, build_pair

_MAX_DETECTIONS = 100  # per image, in all libraries
_TIED = 2e-6  # two scores whose order the rounding of a network decides, 1e-6 per score


def _row(default: float, meaning: str) -> Any:
    return dataclasses.field(default=default, metadata={"meaning": meaning})


@dataclasses.dataclass
class Parity:
    """Largest differences found; 0 where nothing was compared."""

    images: int = _row(0, "images whose detections are compared")
    outputs: float = _row(0.0, "raw head outputs, largest relative difference")
    detections: int = _row(0, "detections of the library")
    empty_boxes: int = _row(0, "of them boxes without area, which fcos_d2 drops")
    unequal_images: int = _row(0, "images with other detections (number, class or order)")
    boxes: float = _row(0.0, "boxes, largest difference in pixels")
    scores: float = _row(0.0, "scores, largest difference")
    training_images: int = _row(0, "images whose losses are compared")
    losses: float = _row(0.0, "the three losses, largest relative difference")
    gradients: float = _row(0.0, "gradients of the last layers, largest relative difference")

    def raise_to(self, name: str, value: float) -> None:
        """Keep the larger value; NaN counts as infinite."""
        setattr(self, name, math.inf if math.isnan(value) else max(getattr(self, name), value))


def compare_checkpoint(
    checkpoint: Mapping,
    source: str = "auto",
    image_batches: Iterable[Sequence[dict]] | None = None,
    training_batches: Iterable[Sequence[dict]] | None = None,
) -> Parity:
    """Load a checkpoint into its library's own model and into fcos_d2, and compare all results.

    Args:
        checkpoint: content of the file, see :func:`fcos_d2.checkpoint.reader.read_checkpoint`.
        source: "torchvision", "detectron2" or "auto".
        image_batches: lists of samples, see :class:`Peer`, at the size that the networks see; by
            default noise of six sizes, in batches of 1 and 3.
        training_batches: the same with ``instances``; by default 50 batches of noise with random
            boxes.

    Raises:
        ValueError: the library can't be run beside fcos_d2.
        ImportError: this version of Detectron2 has no FCOS of its own.
    """
    converted = convert(checkpoint, source)
    ours, theirs = build_pair(converted)
    parity = Parity()
    compare_detections(
        parity, ours, theirs, random_image_batches() if image_batches is None else image_batches
    )
    if training_batches is None:
        training_batches = random_training_batches(len(converted.class_indices))
    compare_losses(parity, ours, theirs, training_batches)
    return parity


def compare_detections(
    parity: Parity, ours: Peer, theirs: Peer, batches: Iterable[Sequence[dict]]
) -> None:
    """Compare raw head outputs and detections."""
    for samples in batches:
        wanted, wanted_outputs = theirs.detect_with_outputs(samples)
        got, outputs = ours.detect_with_outputs(samples)
        for one, other in zip(outputs, wanted_outputs, strict=True):
            parity.raise_to("outputs", relative_difference(one, other))
        for one, other in zip(got, wanted, strict=True):
            _compare_instances(parity, one, other)


def compare_losses(
    parity: Parity, ours: Peer, theirs: Peer, batches: Iterable[Sequence[dict]]
) -> None:
    """Compare the three losses, and the gradient of their sum in the last layers.

    Both models are left in training mode, batch norms in evaluation mode.
    """
    for peer in (ours, theirs):
        peer.set_training(True)
        peer.model.requires_grad_(False)
        for module in peer.model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        for predictor in peer.predictors:
            predictor.requires_grad_(True)
    for samples in batches:
        parity.training_images += len(samples)
        got, wanted = (peer.mean_losses(peer.inputs(samples)) for peer in (ours, theirs))
        for one, other in zip(got, wanted, strict=True):
            parity.raise_to("losses", relative_difference(one.detach(), other.detach()))
        for one, other in zip(_gradients(ours, got), _gradients(theirs, wanted), strict=True):
            parity.raise_to("gradients", relative_difference(one, other))


def _gradients(peer: Peer, losses: list[Tensor]) -> Sequence[Tensor]:
    parameters = [x for predictor in peer.predictors for x in predictor.parameters()]
    return torch.autograd.grad(sum(losses), parameters)


def relative_difference(got: Tensor, wanted: Tensor) -> float:
    """Largest |got - wanted| / |wanted|; where |wanted| is below its mean, over the mean."""
    if got.shape != wanted.shape:
        raise ValueError(f"shapes differ: {tuple(got.shape)} and {tuple(wanted.shape)}")
    if not wanted.numel():
        return 0.0
    scale = wanted.abs()
    scale = scale.clamp(min=max(scale.mean().item(), 1e-12))
    return ((got - wanted).abs() / scale).max().item()


def random_image_batches() -> Iterator[list[dict]]:
    """Noise of six sizes: each alone, then together with two smaller images.

    Padded to multiples of 32, only one of them is a multiple of 128: on the others torchvision's
    locations of P6 and P7 are less than a stride apart.
    """
    generator = torch.Generator().manual_seed(0)

    def sample(height: int, width: int) -> dict:
        shape = (3, height, width)
        return {"image": torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)}

    for height, width in [(96, 128), (128, 160), (200, 264), (256, 256), (320, 200), (70, 352)]:
        yield [sample(height, width)]
        yield [sample(height, width), sample(height - 9, width), sample(height // 2, width - 40)]


def random_training_batches(num_classes: int) -> Iterator[list[dict]]:
    """50 batches of 1 to 3 images of noise, two of them large, with 0 to 60 boxes per image."""
    sizes = [(96, 128), (64, 96), (160, 96), (128, 128), (70, 200)]
    for k in range(50):
        size = sizes[k % 5] if k < 48 else (416, 544)
        yield random_samples(1 + k % 3 if k < 48 else 1, size, num_classes, seed=k)


def random_samples(count: int, size: tuple[int, int], num_classes: int, seed: int) -> list[dict]:
    """Noise of one size with 0 to 60 boxes each, of all sizes and near the levels' bounds.

    Cases that the other libraries match imprecisely do not occur: coordinates are fractional, so
    that no distance equals a bound exactly, and no two areas in an image are within 16 square
    pixels, which 1e8 - area in float32 may not distinguish.
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
        instances = Instances(size, gt_boxes=Boxes(boxes), gt_classes=classes)
        samples.append({"image": image, "instances": instances})
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
    if len(wanted) == _MAX_DETECTIONS:  # its empty boxes count towards the limit
        got = got[: int(has_area.sum())]
    wanted = wanted[has_area]
    if not torch.equal(got.pred_classes, wanted.pred_classes):
        parity.unequal_images += 1
        return
    if len(got):
        boxes = (got.pred_boxes.tensor[:, None] - wanted.pred_boxes.tensor).abs().amax(2)
        # Two detections of a class may change places if the library's own scores are tied.
        tied = (wanted.scores[:, None] - wanted.scores).abs() < _TIED
        tied &= wanted.pred_classes[:, None] == wanted.pred_classes
        boxes = boxes.masked_fill(~tied, math.inf)  # the diagonal stays
        parity.raise_to("boxes", max(boxes.amin(dim).max().item() for dim in (0, 1)))
        parity.raise_to("scores", (got.scores - wanted.scores).abs().max().item())
