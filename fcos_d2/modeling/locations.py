"""The grid of locations: image position of each cell of each feature map."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Locations:
    """All locations of all levels of one batch shape, finest level first, row by row.

    Attributes:
        points: (L, 2) float32, (x, y) in input pixels.
        strides: (L,) float32, the stride of each location's level in pixels.
        level_sizes: (height, width) of each level's feature map.
        level_strides: the stride of each level, the unit of its distances.
        level_steps: pixels between neighboring rows and columns of each level.
        offset: position of a location in its cell, in strides.
    """

    points: Tensor
    strides: Tensor
    level_sizes: list[tuple[int, int]]
    level_strides: list[int]
    level_steps: list[tuple[int, int]]
    offset: float

    @property
    def level_lengths(self) -> list[int]:
        """Number of locations of each level."""
        return [height * width for height, width in self.level_sizes]

    def level_of(self, index: Tensor) -> Tensor:
        """Level, 0 for the finest, of each index of a location."""
        level = torch.zeros_like(index)
        start = 0
        for length in self.level_lengths[:-1]:
            start += length
            level += index >= start
        return level


def compute_locations(
    level_sizes: Sequence[tuple[int, int]],
    level_strides: Sequence[int],
    offset: float = 0.5,
    device: torch.device | str = "cpu",
    image_size: tuple[int, int] | None = None,
) -> Locations:
    """Place location (i, j) of a level with stride s at ((j + offset) s, (i + offset) s).

    With ``image_size`` the step is image size // map size instead of s, as in torchvision's
    ``AnchorGenerator``: 7 cells over 416 pixels, at stride 64, are 59 pixels apart.

    Args:
        level_sizes: (height, width) of each feature map, finest first.
        level_strides: stride in pixels of each feature map.
        offset: 0.5 is the centre of a cell (FCOS, section 3.1); torchvision uses 0.
        device: device of the tensors.
        image_size: (height, width) of the padded batch, or None for a step of one stride.
    """
    points, strides, steps = [], [], []
    for (height, width), stride in zip(level_sizes, level_strides, strict=True):
        step_y, step_x = stride, stride
        if image_size is not None:
            step_y, step_x = image_size[0] // height, image_size[1] // width
        ys = (torch.arange(height, device=device, dtype=torch.float32) + offset) * step_y
        xs = (torch.arange(width, device=device, dtype=torch.float32) + offset) * step_x
        grid_y, grid_x = torch.meshgrid(ys, xs, indexing="ij")
        points.append(torch.stack((grid_x, grid_y), dim=-1).reshape(-1, 2))
        strides.append(torch.full((height * width,), float(stride), device=device))
        steps.append((int(step_y), int(step_x)))
    return Locations(
        torch.cat(points),
        torch.cat(strides),
        [(int(h), int(w)) for h, w in level_sizes],
        [int(s) for s in level_strides],
        steps,
        offset,
    )
