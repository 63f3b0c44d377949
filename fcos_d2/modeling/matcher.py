"""`CenterSamplingMatcher`: which ground-truth box, if any, each location learns."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from detectron2.config import configurable
from detectron2.structures import Instances
from torch import Tensor

from ..config import get_num_classes
from .locations import Locations


class Matches(NamedTuple):
    """What each location of each image learns.

    Attributes:
        labels: (N, L) int64: class 0..K-1, or K for background, or -1 where an ignored box is.
        gt_inds: (N, L) int64: row of the matched box in ``gt_boxes``; -1 for background.
        gt_boxes: (M, 4) float32, the boxes of all images one after the other, XYXY pixels.
        gt_ignore: (M,) bool, the boxes that are ignored.
    """

    labels: Tensor
    gt_inds: Tensor
    gt_boxes: Tensor
    gt_ignore: Tensor


class _Boxes(NamedTuple):
    """The boxes of a batch in float64, where differences and areas of float32 are exact."""

    xyxy: Tensor  # (M, 4)
    center: Tensor  # (M, 2)
    image: Tensor  # (M,) image index
    rank: Tensor  # (M,) order of preference at a location that several boxes claim


class CenterSamplingMatcher:
    """Match ground truth to locations with center sampling (paper, section 3.1 and its update).

    A location is positive for a box when it is strictly inside the box, strictly inside the square
    of half-side ``radius * stride`` around the box centre, and max(l, t, r, b) is in the level's
    range, both ends included. Of several boxes the smallest exact area wins, of equal areas the
    earlier box. An ignored box claims only what no other box does.

    With a radius, a box can claim at most ceil(2 radius)^2 locations of a level (that are a stride
    apart), so just those are tested: time and memory grow with the boxes, not with boxes times
    locations.
    """

    @configurable
    def __init__(
        self,
        *,
        num_classes: int,
        radius: float,
        sizes_of_interest: Sequence[float],
        class_agnostic: bool = False,
    ):
        """Fix the rule.

        Args:
            num_classes: number of foreground classes K; K is also the label of the background.
            radius: half-side of the central square in strides; 0 or less takes the whole box.
            sizes_of_interest: increasing bounds in pixels between the levels' ranges of
                max(l, t, r, b). The first range starts at 0, the last has no end.
            class_agnostic: every box is of class 0.

        Raises:
            ValueError: the bounds do not increase.
        """
        bounds = [0.0, *map(float, sizes_of_interest), math.inf]
        if sorted(set(bounds)) != bounds:
            raise ValueError(
                "MODEL.FCOS.SIZES_OF_INTEREST has to be positive and increasing, got "
                f"{list(sizes_of_interest)}."
            )
        self.num_classes = num_classes
        self.class_agnostic = class_agnostic
        self.radius = float(radius)
        self.ranges = list(zip(bounds[:-1], bounds[1:], strict=True))

    @classmethod
    def from_config(cls, cfg) -> dict:
        """Map ``cfg.MODEL.FCOS`` to the constructor's arguments."""
        return {
            "num_classes": get_num_classes(cfg),
            "radius": cfg.MODEL.FCOS.CENTER_SAMPLING_RADIUS,
            "sizes_of_interest": cfg.MODEL.FCOS.SIZES_OF_INTEREST,
            "class_agnostic": cfg.MODEL.FCOS.CLASS_AGNOSTIC,
        }

    @torch.no_grad()
    def __call__(self, locations: Locations, gt_instances: list[Instances]) -> Matches:
        """Match the ground truth of N images to the L locations that they share.

        Args:
            locations: the grid, one level for each range.
            gt_instances: for each image ``gt_boxes`` (XYXY pixels of the network's input),
                ``gt_classes`` and, optionally, ``gt_ignore`` (bool).
        """
        device = locations.points.device
        num_images, num_locations = len(gt_instances), len(locations.points)
        gt_boxes = torch.cat([x.gt_boxes.tensor for x in gt_instances]).to(device).float()
        gt_classes = torch.cat([x.gt_classes for x in gt_instances]).to(device)
        if self.class_agnostic:
            gt_classes = torch.zeros_like(gt_classes)
        gt_ignore = torch.cat([_ignore_flags(x) for x in gt_instances]).to(device)
        boxes, order = _rank_boxes(gt_boxes, gt_ignore, [len(x) for x in gt_instances])

        # The best rank at each location; num_boxes where no box claims it.
        best = torch.full((num_images * num_locations,), len(order), device=device)
        start = 0
        for (height, width), stride, step, bounds in zip(
            locations.level_sizes,
            locations.level_strides,
            locations.level_steps,
            self.ranges,
            strict=True,
        ):
            grid = _Grid(height, width, stride, *step, locations.offset, start, num_locations)
            for flat, rank in self._claims(boxes, grid, bounds):
                best.scatter_reduce_(0, flat, rank, "amin")
            start += height * width

        # Rank num_boxes, the background, looks up the entry appended here.
        gt_inds = torch.cat((order, order.new_tensor([-1])))[best]
        label_of_box = torch.where(gt_ignore, -1, gt_classes)
        label_of_rank = torch.cat((label_of_box[order], order.new_tensor([self.num_classes])))
        shape = (num_images, num_locations)
        return Matches(label_of_rank[best].view(shape), gt_inds.view(shape), gt_boxes, gt_ignore)

    def _claims(self, boxes: _Boxes, grid: "_Grid", bounds: tuple[float, float]):
        """Yield (flat index into (N * L,), rank of the box) of every positive pair of one level.

        Pairs that fail a test are kept, with a rank that loses against everything, so that no
        tensor has a size that depends on the data.
        """
        if not len(boxes.rank):
            return
        if self.radius > 0:
            half_side = self.radius * grid.stride
            x, y = boxes.center.unbind(1)
            columns = _window(x, half_side, grid.step_x, grid.offset, grid.width)
            rows = _window(y, half_side, grid.step_y, grid.offset, grid.height)
            yield _test_claims(boxes, grid, columns, rows, bounds, half_side)
            return
        # Whole boxes: a box can claim a whole level, so the rows of the map go in chunks that
        # bound the number of pairs.
        columns = torch.arange(grid.width, device=boxes.rank.device)
        columns = columns.expand(len(boxes.rank), -1)
        step = max(1, _MAX_PAIRS // max(1, columns.numel()))
        for row in range(0, grid.height, step):
            rows = torch.arange(row, min(row + step, grid.height), device=columns.device)
            rows = rows.expand(len(boxes.rank), -1)
            yield _test_claims(boxes, grid, columns, rows, bounds, math.inf)


def _window(center: Tensor, half_side: float, step: int, offset: float, limit: int) -> Tensor:
    """Indices (M, C) of the rows or columns that can be within ``half_side`` of ``center`` (M,).

    All of them are in 0..limit - 1; some may be too far away.
    """
    first = ((center - half_side) / step - offset).floor().long() + 1
    side = min(math.ceil(2 * half_side / step), limit)
    return first.clamp(0, limit - side)[:, None] + torch.arange(side, device=first.device)


# Pairs (box, location) tested at a time when whole boxes are positive.
_MAX_PAIRS = 1 << 18


class _Grid(NamedTuple):
    """One level of the locations."""

    height: int
    width: int
    stride: int
    step_y: int
    step_x: int
    offset: float
    start: int  # index of the level's first location
    num_locations: int  # of all levels


def _test_claims(
    boxes: _Boxes,
    grid: _Grid,
    columns: Tensor,
    rows: Tensor,
    bounds: tuple[float, float],
    half_side: float,
) -> tuple[Tensor, Tensor]:
    """Test every (row, column) cell of each box: columns (M, C), rows (M, R) -> 2 x (M * R * C,).

    The conditions separate into x and y, all but the range: max(l, t, r, b) is the larger of
    max(l, r) and max(t, b).
    """
    x = (columns.double() + grid.offset) * grid.step_x
    y = (rows.double() + grid.offset) * grid.step_y
    x0, y0, x1, y1 = boxes.xyxy[:, :, None].unbind(1)  # each (M, 1)
    center_x, center_y = boxes.center[:, :, None].unbind(1)
    x_inside = (x > x0) & (x < x1) & ((x - center_x).abs() < half_side)
    y_inside = (y > y0) & (y < y1) & ((y - center_y).abs() < half_side)
    reach_x = torch.maximum(x - x0, x1 - x)
    reach_y = torch.maximum(y - y0, y1 - y)
    reach = torch.maximum(reach_y[:, :, None], reach_x[:, None, :])  # (M, R, C)
    positive = y_inside[:, :, None] & x_inside[:, None, :]
    positive &= (reach >= bounds[0]) & (reach <= bounds[1])

    flat = rows[:, :, None] * grid.width + columns[:, None, :] + grid.start
    flat = flat + (boxes.image * grid.num_locations)[:, None, None]
    rank = torch.where(positive, boxes.rank[:, None, None], len(boxes.rank))
    return flat.flatten(), rank.flatten()


def _rank_boxes(gt_boxes: Tensor, gt_ignore: Tensor, counts: list[int]) -> tuple[_Boxes, Tensor]:
    """Order the boxes by (ignored, exact area, index); return them and that order (M,)."""
    device = gt_boxes.device
    xyxy = gt_boxes.double()
    size = xyxy[:, 2:] - xyxy[:, :2]
    # Two stable sorts, the less important key first.
    order = torch.sort(size[:, 0] * size[:, 1], stable=True).indices
    order = order[torch.sort(gt_ignore[order].to(torch.uint8), stable=True).indices]
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=device)
    image = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).to(device)
    return _Boxes(xyxy, (xyxy[:, :2] + xyxy[:, 2:]) / 2, image, rank), order


def _ignore_flags(instances: Instances) -> Tensor:
    if instances.has("gt_ignore"):
        return instances.gt_ignore.bool()
    return torch.zeros(len(instances), dtype=torch.bool)
