"""Synthetic inputs, the same for all peers."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fcos_d2.modeling.decoder import encode_boxes
from references import Sample

from .peers import NUM_CLASSES, STRIDES, Maps, Peer


class Case(NamedTuple):
    """A load.

    Attributes:
        batch: images.
        height: of each, in pixels.
        width: of each, in pixels.
        boxes: ground-truth boxes of each; for the decoder, objects that it shall find.
    """

    batch: int
    height: int
    width: int
    boxes: int

    @property
    def image_sizes(self) -> list[tuple[int, int]]:
        """(height, width) of each image."""
        return [(self.height, self.width)] * self.batch

    @property
    def padded(self) -> tuple[int, int]:
        """Height and width that all models pad the batch to."""
        return math.ceil(self.height / 32) * 32, math.ceil(self.width / 32) * 32

    @property
    def level_sizes(self) -> list[tuple[int, int]]:
        """(height, width) of each level's maps."""
        return [tuple(math.ceil(side / stride) for side in self.padded) for stride in STRIDES]


def make_samples(case: Case, device: str, seed: int = 0) -> list[Sample]:
    """Noise with boxes of all sizes from 16 pixels to the image's, anywhere in it."""
    generator = torch.Generator().manual_seed(seed)
    limit = torch.tensor([case.width, case.height])
    samples = []
    for _ in range(case.batch):
        shape = (3, case.height, case.width)
        image = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        extent = 16 * (limit / 16) ** torch.rand(case.boxes, 2, generator=generator)
        corner = torch.rand(case.boxes, 2, generator=generator) * (limit - extent)
        boxes = torch.cat((corner, corner + extent), dim=1)
        classes = torch.randint(NUM_CLASSES, (case.boxes,), generator=generator)
        samples.append(Sample(*(x.to(device) for x in (image, boxes, classes))))
    return samples


def make_images(case: Case, device: str) -> list[Tensor]:
    """Noise images alone."""
    return [x.image for x in make_samples(case._replace(boxes=0), device)]


def training_maps(case: Case, device: str, seed: int = 0) -> Maps:
    """Outputs of the last convolutions as early in a training, leaves that want a gradient."""
    generator = torch.Generator().manual_seed(seed)

    def noise(channels: int, mean: float) -> list[Tensor]:
        shapes = [(case.batch, channels, *size) for size in case.level_sizes]
        maps = [mean + torch.randn(shape, generator=generator) for shape in shapes]
        return [x.to(device).requires_grad_() for x in maps]

    return Maps(noise(NUM_CLASSES, -4.0), noise(4, 2.0), noise(1, 0.0))


@torch.no_grad()
def detection_maps(case: Case, device: str, ours: Peer, seed: int = 0) -> Maps:
    """Outputs of the last convolutions that find the objects of :func:`make_samples`.

    Every location that center sampling gives to an object is a candidate for it, with a box that
    is up to a fifth off and any score above the threshold; at most six an object, over all of an
    image's. Everything else is background.
    """
    generator = torch.Generator().manual_seed(seed)
    targets = ours.targets(make_samples(case, "cpu", seed))
    grid = ours.grid(training_maps(case, "cpu"), case.padded)
    matches = ours.match(grid, targets)
    num_locations = len(grid.points)
    logits = torch.full((case.batch, num_locations, NUM_CLASSES), -8.0)
    ltrb = torch.ones(case.batch, num_locations, 4)
    quality = torch.zeros(case.batch, num_locations, 1)
    for number, labels in enumerate(matches.labels):
        place = (labels < NUM_CLASSES).nonzero().squeeze(1)
        place = place[torch.randperm(len(place), generator=generator)[: 6 * case.boxes]]
        boxes = matches.gt_boxes[matches.gt_inds[number, place]]
        distances = encode_boxes(grid.points[place], grid.strides[place], boxes)
        error = 0.8 + 0.4 * torch.rand(distances.shape, generator=generator)
        cls, ctr = -1 + 4 * torch.rand(2, len(place), generator=generator)
        logits[number, place, labels[place]] = cls
        ltrb[number, place] = distances * error
        quality[number, place, 0] = ctr
    return Maps(*(_to_maps(x.to(device), case) for x in (logits, ltrb, quality)))


def _to_maps(flat: Tensor, case: Case) -> list[Tensor]:
    """(N, L, C) to one contiguous (N, C, H_l, W_l) a level."""
    levels = flat.split([height * width for height, width in case.level_sizes], dim=1)
    return [
        x.transpose(1, 2).unflatten(2, size).contiguous()
        for x, size in zip(levels, case.level_sizes, strict=True)
    ]
