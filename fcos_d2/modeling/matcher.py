"""`CenterSamplingMatcher`: which ground-truth box, if any, each location learns."""

import math
from collections.abc import Iterator, Sequence
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
    """Boxes of a batch in float64, where differences and areas of float32 are exact."""

    low: Tensor  # (M, 2) upper left corner; axes are (y, x) here
    high: Tensor  # (M, 2) lower right corner
    image: Tensor  # (M,) image index
    rank: Tensor  # (M,) order of preference at a location that several boxes claim


class _Levels(NamedTuple):
    """Geometry of V levels in float64; axes are (y, x)."""

    step: Tensor  # (V, 2) pixels between two cells
    size: Tensor  # (V, 2) number of cells
    start: Tensor  # (V,) index of the first location
    half_side: Tensor  # (V,) of the square around a centre that is positive
    half_window: Tensor  # (V,) of the square outside which no location can be positive
    reach: Tensor  # (V, 2) least and largest max(l, t, r, b)


class CenterSamplingMatcher:
    """Match ground truth to locations with center sampling (paper, section 3.1 and its update).

    A location is positive for a box when it is strictly inside the box, strictly inside the square
    of half-side ``radius * stride`` around the box centre, and max(l, t, r, b) is in the level's
    range, both ends included. Of several boxes the smallest exact area wins, of equal areas the
    earlier box. An ignored box claims only what no other box does.

    A location that a box claims is nearer to the box centre than ``radius * stride`` and than the
    end of the level's range (if all sides are within it, so is half the box). Just the cells in
    that square are tested, 3 x 3 a level with a radius of 1.5, of all levels and images at once:
    time and memory grow with the boxes, not with boxes times locations, and the boxes go in chunks
    of bounded memory. Nothing waits for the device.
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
        self._levels: dict[tuple, _Levels] = {}

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
        levels = self._levels_of(locations)
        for chunk, first, size in _windows(boxes, levels, self._window_size(locations), locations):
            flat, positive = _test_window(chunk, levels, first, size, locations.offset)
            flat = flat + (chunk.image * num_locations)[:, None, None, None]
            # Pairs that fail lose against everything, so that no size depends on the data.
            rank = torch.where(positive, chunk.rank[:, None, None, None], len(order))
            best.scatter_reduce_(0, flat.flatten(), rank.flatten(), "amin")

        # Rank num_boxes, the background, looks up the entry appended here.
        gt_inds = torch.cat((order, order.new_full((1,), -1)))[best]
        label_of_box = torch.where(gt_ignore, -1, gt_classes)
        label_of_rank = torch.cat((label_of_box[order], order.new_full((1,), self.num_classes)))
        shape = (num_images, num_locations)
        return Matches(label_of_rank[best].view(shape), gt_inds.view(shape), gt_boxes, gt_ignore)

    @torch.no_grad()
    def count_candidates(
        self, locations: Locations, gt_instances: list[Instances]
    ) -> tuple[Tensor, Tensor]:
        """Count the locations that pass the test for each box, whichever box wins them.

        Args:
            locations, gt_instances: as in :meth:`__call__`; ignored boxes count like the others.

        Returns:
            (M,) int64, the candidates of the boxes of all images, and (N, L) int64, the boxes that
            each location is a candidate of.
        """
        device = locations.points.device
        num_images, num_locations = len(gt_instances), len(locations.points)
        gt_boxes = torch.cat([x.gt_boxes.tensor for x in gt_instances]).to(device).float()
        counts = [len(x) for x in gt_instances]
        ignore = torch.zeros(len(gt_boxes), dtype=torch.bool, device=device)
        boxes, order = _rank_boxes(gt_boxes, ignore, counts)
        candidates = torch.zeros_like(order)
        claims = torch.zeros(num_images * num_locations, dtype=torch.int64, device=device)
        levels = self._levels_of(locations)
        for chunk, first, size in _windows(boxes, levels, self._window_size(locations), locations):
            flat, positive = _test_window(chunk, levels, first, size, locations.offset)
            flat = flat + (chunk.image * num_locations)[:, None, None, None]
            candidates.index_add_(0, order[chunk.rank], positive.sum((1, 2, 3)))
            claims.scatter_add_(0, flat.flatten(), positive.flatten().long())
        return candidates, claims.view(num_images, num_locations)

    def _levels_of(self, locations: Locations) -> _Levels:
        """Copy the geometry to the device, once for each: a CUDA graph can't hold such a copy."""
        device = locations.points.device
        key = (device, *locations.level_sizes, *locations.level_steps, *locations.level_strides)
        if key not in self._levels:
            start, rows = 0, []
            for size, stride, step, reach in zip(
                locations.level_sizes,
                locations.level_strides,
                locations.level_steps,
                self.ranges,
                strict=True,
            ):
                half_side = self._half_side(stride)
                half_window = min(half_side, reach[1])
                rows.append((*step, *size, start, half_side, half_window, *reach))
                start += size[0] * size[1]
            table = torch.tensor(rows, dtype=torch.float64, device=device)
            step, size, start, half_side, half_window, reach = table.split((2, 2, 1, 1, 1, 2), 1)
            levels = _Levels(step, size, start[:, 0], half_side[:, 0], half_window[:, 0], reach)
            if type(table) is not Tensor:  # a fake one, not to be seen again
                return levels
            self._levels[key] = levels
        return self._levels[key]

    def _half_side(self, stride: int) -> float:
        return self.radius * stride if self.radius > 0 else math.inf

    def _window_size(self, locations: Locations) -> tuple[int, int]:
        """Rows and columns that hold every cell inside ``half_window``, on any level."""
        sides = [(1, 1)]
        for size, stride, step, reach in zip(
            locations.level_sizes,
            locations.level_strides,
            locations.level_steps,
            self.ranges,
            strict=True,
        ):
            window = 2 * min(self._half_side(stride), reach[1])
            sides.append(
                tuple(
                    cells if math.isinf(window) else min(cells, math.ceil(window / pixels))
                    for cells, pixels in zip(size, step, strict=True)
                )
            )
        rows, columns = zip(*sides, strict=True)
        return max(rows), max(columns)


# Pairs (box, location) tested at a time, which takes about 60 bytes each.
_MAX_PAIRS = 1 << 18


def _windows(
    boxes: _Boxes, levels: _Levels, size: tuple[int, int], locations: Locations
) -> Iterator[tuple[_Boxes, Tensor, tuple[int, int]]]:
    """Yield M boxes, the first cell (M, V, 2) to test of each, and how many (rows, columns)."""
    num_levels, (height, width) = len(levels.start), size
    rows = max(1, min(height, _MAX_PAIRS // (num_levels * width)))
    count = max(1, _MAX_PAIRS // (num_levels * rows * width))
    for start in range(0, len(boxes.rank), count):
        chunk = _Boxes(*(x[start : start + count] for x in boxes))
        center = (chunk.low + chunk.high)[:, None] / 2
        first = (center - levels.half_window[:, None]) / levels.step - locations.offset
        first = (first.floor() + 1).clamp(min=0)
        for row in range(0, height, rows):
            yield chunk, first + first.new_tensor((row, 0)) if row else first, (rows, width)


def _test_window(
    boxes: _Boxes, levels: _Levels, first: Tensor, size: tuple[int, int], offset: float
) -> tuple[Tensor, Tensor]:
    """Test (rows, columns) cells of each level for each box, from the cell ``first`` (M, V, 2) on.

    The conditions separate into y and x, all but the range: max(l, t, r, b) is the larger of
    max(t, b) and max(l, r).

    Returns:
        Index of the location in its image and whether it is positive, (M, V, rows, columns). A
        cell outside the map is not, under an index that exists.
    """
    cells, inside, reach = [], [], []
    for axis, count in enumerate(size):
        cell = first[..., axis, None] + torch.arange(count, device=first.device)  # (M, V, count)
        place = (cell + offset) * levels.step[:, axis, None]
        low, high = boxes.low[:, axis, None, None], boxes.high[:, axis, None, None]
        before, after = place - low, high - place
        last = levels.size[:, axis, None] - 1
        inside.append(
            (before > 0)
            & (after > 0)
            & ((place - (low + high) / 2).abs() < levels.half_side[:, None])
            & (cell <= last)
        )
        reach.append(torch.maximum(before, after))
        cells.append(cell.minimum(last))
    furthest = torch.maximum(reach[0][..., :, None], reach[1][..., None, :])
    positive = inside[0][..., :, None] & inside[1][..., None, :]
    least, largest = levels.reach[:, :, None, None].unbind(1)
    positive &= (furthest >= least) & (furthest <= largest)
    rows = levels.start[:, None] + cells[0] * levels.size[:, 1, None]
    return (rows[..., :, None] + cells[1][..., None, :]).long(), positive


def _rank_boxes(gt_boxes: Tensor, gt_ignore: Tensor, counts: list[int]) -> tuple[_Boxes, Tensor]:
    """Order the boxes by (ignored, exact area, index); return them and that order (M,)."""
    low, high = gt_boxes.double().view(-1, 2, 2).flip(2).unbind(1)
    # Two stable sorts, the less important key first.
    order = torch.sort((high - low).prod(1), stable=True).indices
    order = order[torch.sort(gt_ignore[order].to(torch.uint8), stable=True).indices]
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device)
    image = torch.cat([order.new_full((count,), index) for index, count in enumerate(counts)])
    return _Boxes(low, high, image, rank), order


def _ignore_flags(instances: Instances) -> Tensor:
    if instances.has("gt_ignore"):
        return instances.gt_ignore.bool()
    return instances.gt_classes.new_zeros(len(instances), dtype=torch.bool)
