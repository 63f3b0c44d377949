"""`CenterSamplingMatcher`: assignment of ground-truth boxes to locations."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from detectron2.config import CfgNode, configurable
from detectron2.structures import Instances
from torch import Tensor

from ..config import get_num_classes
from .locations import Locations


class Matches(NamedTuple):
    """Target of each of L locations in each of N images.

    Attributes:
        labels: (N, L) int64: class 0..K-1, K for background, -1 for an ignored box.
        gt_inds: (N, L) int64: row of the matched box in ``gt_boxes``; -1 for background.
        gt_boxes: (M, 4) float32, the boxes of all images concatenated, XYXY pixels.
        gt_ignore: (M,) bool, whether the box is ignored.
    """

    labels: Tensor
    gt_inds: Tensor
    gt_boxes: Tensor
    gt_ignore: Tensor


class _Levels(NamedTuple):
    """Geometry of V levels in float64; the axes are (y, x)."""

    step: Tensor  # (V, 2) pixels between neighboring cells
    size: Tensor  # (V, 2) number of cells
    start: Tensor  # (V,) index of the level's first location
    half_side: Tensor  # (V,) of the square around a box centre whose locations are positive
    half_window: Tensor  # (V,) of the square outside which no location can be positive
    reach: Tensor  # (V, 2) range of max(l, t, r, b)


# Pairs of a box and a location that are tested at a time; each takes about 60 bytes.
_MAX_PAIRS = 1 << 18


class CenterSamplingMatcher:
    """Match ground truth to locations with center sampling (paper, section 3.1 and its update).

    A location is positive for a box when it is strictly inside the box, strictly inside the square
    of half-side ``radius * stride`` around the box centre, and max(l, t, r, b) is in the level's
    range, both ends included. Of several boxes the one with the smallest exact area wins, of equal
    areas the earlier one. An ignored box only gets locations that no other box claims.

    A positive location is nearer to the box centre than ``radius * stride`` and than the end of
    the level's range (which bounds all four distances). Only the cells in that square are tested,
    3 x 3 per level at a radius of 1.5, for all levels and images at once: time and memory grow
    with the number of boxes, not with boxes times locations, and the boxes are processed in chunks
    of bounded memory. There is no host-device sync.
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
        """Set the rule.

        Args:
            num_classes: number of foreground classes K; K is also the label of the background.
            radius: half-side of the central square in strides; 0 or less takes the whole box.
            sizes_of_interest: increasing bounds in pixels between the levels' ranges of
                max(l, t, r, b). The first range starts at 0, the last is unbounded.
            class_agnostic: treat every box as class 0.

        Raises:
            ValueError: the bounds do not increase.
        """
        bounds = [0.0, *map(float, sizes_of_interest), math.inf]
        if sorted(set(bounds)) != bounds:
            raise ValueError(
                "MODEL.FCOS.SIZES_OF_INTEREST must be positive and increasing, got "
                f"{list(sizes_of_interest)}."
            )
        self.num_classes = num_classes
        self.class_agnostic = class_agnostic
        self.radius = float(radius)
        self.ranges = list(zip(bounds[:-1], bounds[1:], strict=True))

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
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
            locations: the grid, with one level per range.
            gt_instances: for each image ``gt_boxes`` (XYXY pixels of the network's input),
                ``gt_classes`` and, optionally, ``gt_ignore`` (bool).
        """
        device = locations.points.device
        gt_boxes = _concatenate_boxes(gt_instances, device)
        gt_classes = torch.cat([x.gt_classes for x in gt_instances]).to(device)
        if self.class_agnostic:
            gt_classes = torch.zeros_like(gt_classes)
        gt_ignore = torch.cat([_ignore_flags(x) for x in gt_instances]).to(device)

        # Boxes in order of preference. Rank M, the background, refers to the appended entries.
        order = _order_boxes(gt_boxes, gt_ignore)  # (M,)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order), device=device)
        gt_inds = torch.cat((order, order.new_full((1,), -1)))
        labels = torch.where(gt_ignore, -1, gt_classes)[order]
        labels = torch.cat((labels, order.new_full((1,), self.num_classes)))

        shape = (len(gt_instances), len(locations.points))
        best = torch.full((math.prod(shape),), len(order), device=device)
        for chunk, index, positive in self._test(locations, gt_boxes, gt_instances):
            # Failed pairs get the rank of the background, so that no shape depends on the data.
            pair_rank = torch.where(positive, rank[chunk, None, None, None], len(order))
            best.scatter_reduce_(0, index.flatten(), pair_rank.flatten(), "amin")
        return Matches(labels[best].view(shape), gt_inds[best].view(shape), gt_boxes, gt_ignore)

    @torch.no_grad()
    def count_candidates(
        self, locations: Locations, gt_instances: list[Instances]
    ) -> tuple[Tensor, Tensor]:
        """Count the locations that pass the test for each box, whichever box wins them.

        Args:
            locations: as in :meth:`__call__`.
            gt_instances: as in :meth:`__call__`; ignored boxes count like the others.

        Returns:
            The number of candidates per box, (M,) int64, and the number of boxes that claim each
            location, (N, L) int64.
        """
        gt_boxes = _concatenate_boxes(gt_instances, locations.points.device)
        shape = (len(gt_instances), len(locations.points))
        candidates = torch.zeros(len(gt_boxes), dtype=torch.int64, device=gt_boxes.device)
        claims = candidates.new_zeros(math.prod(shape))
        for chunk, index, positive in self._test(locations, gt_boxes, gt_instances):
            candidates[chunk] += positive.sum((1, 2, 3))
            claims.scatter_add_(0, index.flatten(), positive.flatten().long())
        return candidates, claims.view(shape)

    def _test(
        self, locations: Locations, gt_boxes: Tensor, gt_instances: list[Instances]
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Test the boxes against the locations of one window of cells per level.

        On one axis of one level, with cell k at (k + offset) * step pixels::

                 first                     first + count - 1
            |  |  |  |  |  |  |  |  |  |  |  |  |  |  |   cells
                 <- half_window -> c <- half_window ->    c: box centre

        Yields:
            Chunk of m boxes, and for its pairs the index of the location in the batch, counted
            over all images, and whether it is positive, (m, V, rows, columns) each. Cells outside
            the feature map are never positive; their index is that of an existing cell.
        """
        levels, (height, width) = self._levels(locations)
        # float64: differences and areas of float32 coordinates are exact.
        low, high = gt_boxes.double().view(-1, 2, 2).flip(2).unbind(1)  # (M, 2) each, (y, x)
        counts = [len(x) for x in gt_instances]
        offset = torch.cat(
            [
                torch.full((count,), image * len(locations.points), device=gt_boxes.device)
                for image, count in enumerate(counts)
            ]
        )
        rows = max(1, min(height, _MAX_PAIRS // (len(levels.start) * width)))
        size = max(1, _MAX_PAIRS // (len(levels.start) * rows * width))
        for start in range(0, len(gt_boxes), size):
            chunk = slice(start, start + size)
            center = (low[chunk, None] + high[chunk, None]) / 2
            first = (center - levels.half_window[:, None]) / levels.step - locations.offset
            first = (first.floor() + 1).clamp(min=0)  # (m, V, 2)
            for row in range(0, height, rows):
                index, positive = _test_window(
                    (low[chunk], high[chunk]),
                    levels,
                    first + first.new_tensor((row, 0)) if row else first,
                    (rows, width),
                    locations.offset,
                )
                yield chunk, index + offset[chunk, None, None, None], positive

    def _levels(self, locations: Locations) -> tuple[_Levels, tuple[int, int]]:
        """Geometry of the levels, and the (rows, columns) that contain the window of any level."""
        start, table, height, width = 0, [], 1, 1
        for size, stride, step, reach in zip(
            locations.level_sizes,
            locations.level_strides,
            locations.level_steps,
            self.ranges,
            strict=True,
        ):
            half_side = self.radius * stride if self.radius > 0 else math.inf
            half_window = min(half_side, reach[1])
            height = max(height, math.ceil(min(size[0], 2 * half_window / step[0])))
            width = max(width, math.ceil(min(size[1], 2 * half_window / step[1])))
            table.append((*step, *size, start, half_side, half_window, *reach))
            start += size[0] * size[1]
        values = torch.tensor(table, dtype=torch.float64, device=locations.points.device)
        step, size, starts, half_side, half_window, reach = values.split((2, 2, 1, 1, 1, 2), 1)
        levels = _Levels(step, size, starts[:, 0], half_side[:, 0], half_window[:, 0], reach)
        return levels, (height, width)


def _test_window(
    corners: tuple[Tensor, Tensor],
    levels: _Levels,
    first: Tensor,
    size: tuple[int, int],
    offset: float,
) -> tuple[Tensor, Tensor]:
    """Test ``size`` (rows, columns) of cells from ``first`` (M, V, 2) on; see ``_test``.

    All conditions separate into y and x but the range: max(l, t, r, b) is the larger of max(t, b)
    and max(l, r).
    """
    cells, inside, furthest = [], [], []
    for axis, count in enumerate(size):
        low, high = (x[:, axis, None, None] for x in corners)
        cell = first[..., axis, None] + torch.arange(count, device=first.device)  # (M, V, count)
        position = (cell + offset) * levels.step[:, axis, None]
        before, after = position - low, high - position
        last = levels.size[:, axis, None] - 1
        inside.append(
            (before > 0)
            & (after > 0)
            & ((position - (low + high) / 2).abs() < levels.half_side[:, None])
            & (cell <= last)
        )
        furthest.append(torch.maximum(before, after))
        cells.append(cell.minimum(last))
    reach = torch.maximum(furthest[0][..., :, None], furthest[1][..., None, :])
    positive = inside[0][..., :, None] & inside[1][..., None, :]
    least, largest = levels.reach[:, :, None, None].unbind(1)
    positive &= (reach >= least) & (reach <= largest)
    row_starts = levels.start[:, None] + cells[0] * levels.size[:, 1, None]
    return (row_starts[..., :, None] + cells[1][..., None, :]).long(), positive


def _order_boxes(gt_boxes: Tensor, gt_ignore: Tensor) -> Tensor:
    """Indices (M,) of the boxes, sorted by (ignored, exact area, index)."""
    corners = gt_boxes.double()
    # Two stable sorts, by the less important key first.
    order = (corners[:, 2:] - corners[:, :2]).prod(1).argsort(stable=True)
    return order[gt_ignore[order].to(torch.uint8).argsort(stable=True)]


def _concatenate_boxes(gt_instances: list[Instances], device: torch.device) -> Tensor:
    return torch.cat([x.gt_boxes.tensor for x in gt_instances]).to(device).float()


def _ignore_flags(instances: Instances) -> Tensor:
    if instances.has("gt_ignore"):
        return instances.gt_ignore.bool()
    return instances.gt_classes.new_zeros(len(instances), dtype=torch.bool)
