"""Where torchvision matches otherwise than the definition says, and that it does nowhere else.

torchvision excludes both ends of a level's range, and compares areas as 1e8 - area in float32, in
which areas of less than about 8 square pixels apart are equal. `CenterSamplingMatcher` does neither
(design: exact areas, both ends included), and has no option for it.
"""

import math
import random

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from torch import nn
from torchvision.models.detection import FCOS
from torchvision.models.detection.image_list import ImageList

from fcos_d2.modeling import CenterSamplingMatcher, compute_locations

STRIDES = [8, 16, 32, 64, 128]
BOUNDS = [64, 128, 256, 512]


class _NoBackbone(nn.Module):
    out_channels = 32


def torchvision_matches(image_size, sizes, boxes):
    """The box index of each location, -1 for none, as torchvision hands it to its head."""
    model = FCOS(_NoBackbone(), num_classes=2)
    recorded = []
    model.head.compute_loss = lambda targets, outputs, anchors, matches: recorded.extend(matches)
    images = ImageList(torch.zeros(1, 3, *image_size), [image_size])
    anchors = model.anchor_generator(images, [torch.zeros(1, 1, *size) for size in sizes])
    targets = [{"boxes": boxes, "labels": torch.zeros(len(boxes), dtype=torch.int64)}]
    model.compute_loss(targets, {}, anchors, [h * w for h, w in sizes])
    return recorded[0].tolist()


def plain_matches(locations, boxes, strict_ends, coarse_areas):
    """The definition in plain loops, with torchvision's two deviations as switches."""
    ranges = list(zip([0, *BOUNDS], [*BOUNDS, math.inf], strict=True))
    level_of = [k for k, n in enumerate(locations.level_lengths) for _ in range(n)]
    matches = []
    for (x, y), level in zip(locations.points.tolist(), level_of, strict=True):
        half, (low, high) = 1.5 * STRIDES[level], ranges[level]
        best = (math.inf, -1)
        for index, (x0, y0, x1, y1) in enumerate(boxes):
            sides = (x - x0, y - y0, x1 - x, y1 - y)
            inside = low < max(sides) < high if strict_ends else low <= max(sides) <= high
            distance = max(abs(x - (x0 + x1) / 2), abs(y - (y0 + y1) / 2))
            if min(sides) > 0 and distance < half and inside:
                area = (x1 - x0) * (y1 - y0)
                if coarse_areas:
                    area = -float(np.float32(1e8) - np.float32(area))
                best = min(best, (area, index))
        matches.append(best[1])
    return matches


def random_boxes(rng, height, width, count, integer):
    boxes = []
    for _ in range(count):
        w, h = (
            math.exp(rng.uniform(math.log(6), math.log(1.2 * side))) for side in (width, height)
        )
        x, y = rng.uniform(-w / 3, width - w / 2), rng.uniform(-h / 3, height - h / 2)
        box = [x, y, x + w, y + h]
        # Multiples of 8 put distances on the bounds; a nearly equal box makes areas nearly equal.
        box = [8.0 * round(v / 8) for v in box] if integer else box
        boxes += [box, [v + rng.uniform(-0.02, 0.02) for v in box]]
    return torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)


@pytest.mark.parametrize("integer", [True, False])
def test_the_two_deviations_explain_every_difference(integer):
    rng = random.Random(0)
    totals = {"same": 0, "ends": 0, "areas": 0}
    for number in range(25):
        height, width = rng.choice([(160, 224), (256, 320), (352, 288)])
        sizes = [(math.ceil(height / s), math.ceil(width / s)) for s in STRIDES]
        boxes = random_boxes(rng, height, width, (number % 4) * 4, integer)
        locations = compute_locations(sizes, STRIDES, 0.0, image_size=(height, width))
        instances = Instances((height, width), gt_boxes=Boxes(boxes))
        instances.gt_classes = torch.zeros(len(boxes), dtype=torch.int64)
        matcher = CenterSamplingMatcher(num_classes=1, radius=1.5, sizes_of_interest=BOUNDS)
        ours = matcher(locations, [instances]).gt_inds[0].tolist()
        if len(boxes):
            theirs = torchvision_matches((height, width), sizes, boxes)
        else:
            theirs = [-1] * len(ours)
        rows = boxes.tolist()
        assert ours == plain_matches(locations, rows, strict_ends=False, coarse_areas=False)
        both = plain_matches(locations, rows, strict_ends=True, coarse_areas=True)
        assert theirs == both
        ends = plain_matches(locations, rows, strict_ends=True, coarse_areas=False)
        for own, other, with_ends in zip(ours, theirs, ends, strict=True):
            totals["same" if own == other else "ends" if own != with_ends else "areas"] += 1
    print(f"integer={integer}: locations {totals}")
    assert totals["same"] > 20_000
    assert totals["areas"] > 20
    # With fractional coordinates no distance meets a bound exactly.
    assert (totals["ends"] > 20) == integer
