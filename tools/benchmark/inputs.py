"""Synthetic inputs, the same for all peers."""

import math
from typing import NamedTuple

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor

from fcos_d2.modeling.decoder import encode_boxes
from peers import NUM_CLASSES, STRIDES, LevelOutputs, Peer


class Case(NamedTuple):
    """Size of the inputs."""

    batch: int  # number of images
    height: int  # of each image, in pixels
    width: int  # of each image, in pixels
    boxes: int  # ground-truth boxes of each image; for the decoder, objects to find

    @property
    def image_sizes(self) -> list[tuple[int, int]]:
        """(height, width) of each image."""
        return [(self.height, self.width)] * self.batch

    @property
    def padded(self) -> tuple[int, int]:
        """(height, width) that all models pad the batch to."""
        return math.ceil(self.height / 32) * 32, math.ceil(self.width / 32) * 32

    @property
    def level_sizes(self) -> list[tuple[int, int]]:
        """(height, width) of the maps of each level."""
        return [tuple(math.ceil(side / stride) for side in self.padded) for stride in STRIDES]


def make_samples(case: Case, device: str, seed: int = 0) -> list[dict]:
    """Return noise with boxes of all sizes, from 16 pixels to the image's, anywhere in it."""
    generator = torch.Generator().manual_seed(seed)
    limit = torch.tensor([case.width, case.height])
    samples = []
    for height, width in case.image_sizes:
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)
        extent = 16 * (limit / 16) ** torch.rand(case.boxes, 2, generator=generator)
        corner = torch.rand(case.boxes, 2, generator=generator) * (limit - extent)
        boxes = Boxes(torch.cat((corner, corner + extent), dim=1))
        classes = torch.randint(NUM_CLASSES, (case.boxes,), generator=generator)
        instances = Instances((height, width), gt_boxes=boxes, gt_classes=classes)
        samples.append({"image": image.to(device), "instances": instances.to(device)})
    return samples


def make_images(case: Case, device: str) -> list[dict]:
    """Return noise without ground truth."""
    return [{"image": x["image"]} for x in make_samples(case._replace(boxes=0), device)]


def training_outputs(case: Case, device: str, seed: int = 0) -> list[LevelOutputs]:
    """Return outputs of the last convolutions as early in training: leaves with gradients."""
    generator = torch.Generator().manual_seed(seed)

    def noise(channels: int, size: tuple[int, int], mean: float) -> Tensor:
        x = mean + torch.randn(case.batch, channels, *size, generator=generator)
        return x.to(device).requires_grad_()

    return [
        LevelOutputs(noise(NUM_CLASSES, x, -4.0), noise(4, x, 2.0), noise(1, x, 0.0))
        for x in case.level_sizes
    ]


@torch.no_grad()
def detection_outputs(case: Case, device: str, ours: Peer, seed: int = 0) -> list[LevelOutputs]:
    """Return outputs of the last convolutions that detect the objects of :func:`make_samples`.

    Every location that center sampling assigns to an object is a candidate for it, with distances
    that are up to a fifth off and any score above the threshold; on average at most six per
    object. All else is background.
    """
    generator = torch.Generator().manual_seed(seed)
    grid = ours.grid(training_outputs(case, "cpu"), case.padded)
    matches = ours.match(grid, ours.ground_truth(make_samples(case, "cpu", seed)))
    num_locations = len(grid.points)
    logits = torch.full((case.batch, num_locations, NUM_CLASSES), -8.0)
    ltrb = torch.ones(case.batch, num_locations, 4)
    centerness = torch.zeros(case.batch, num_locations, 1)
    for image, labels in enumerate(matches.labels):
        index = (labels < NUM_CLASSES).nonzero().squeeze(1)
        index = index[torch.randperm(len(index), generator=generator)[: 6 * case.boxes]]
        boxes = matches.gt_boxes[matches.gt_inds[image, index]]
        distances = encode_boxes(grid.points[index], grid.strides[index], boxes)
        error = 0.8 + 0.4 * torch.rand(distances.shape, generator=generator)
        cls, ctr = -1 + 4 * torch.rand(2, len(index), generator=generator)
        logits[image, index, labels[index]] = cls
        ltrb[image, index] = distances * error
        centerness[image, index, 0] = ctr
    maps = (_to_maps(x.to(device), case) for x in (logits, ltrb, centerness))
    return [LevelOutputs(*level) for level in zip(*maps, strict=True)]


def _to_maps(flat: Tensor, case: Case) -> list[Tensor]:
    """(N, L, C) to one contiguous (N, C, H_l, W_l) per level."""
    levels = flat.split([height * width for height, width in case.level_sizes], dim=1)
    return [
        x.transpose(1, 2).unflatten(2, size).contiguous()
        for x, size in zip(levels, case.level_sizes, strict=True)
    ]
