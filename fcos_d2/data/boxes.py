"""Boxes of dataset records."""

import math
from collections.abc import Sequence

import numpy as np
from detectron2.structures import BoxMode

SIZES = ("small", "medium", "large")
# COCO's bounds between them: areas in pixels of the original image.
_AREAS = (32**2, 96**2)


def size_of_area(areas: Sequence[float]) -> np.ndarray:
    """Return COCO's size name of each area, in pixels of the original image."""
    return np.array(SIZES, dtype=object)[np.searchsorted(_AREAS, areas, side="right")]


def box_xywh(annotation: dict) -> list[float]:
    """Return an annotation's box as continuous ``[x, y, width, height]`` in pixels of the image."""
    return _convert(annotation, BoxMode.XYWH_ABS)


def box_xyxy(annotation: dict) -> list[float]:
    """Return an annotation's box as continuous ``[x0, y0, x1, y1]`` in pixels of the image."""
    return _convert(annotation, BoxMode.XYXY_ABS)


def _convert(annotation: dict, mode: BoxMode) -> list[float]:
    box = np.array([annotation["bbox"]], dtype=np.float64)  # a list would be rounded to float32
    return BoxMode.convert(box, annotation["bbox_mode"], mode)[0].tolist()


def box_problem(box: Sequence[float], width: float, height: float) -> str | None:
    """Return why a box can't be trained on, or None.

    A box that sticks out of the image is fine: it is clipped when the image is read.

    Args:
        box: continuous 0-based (x0, y0, x1, y1) in pixels.
        width, height: size of the image in pixels.
    """
    x0, y0, x1, y1 = box
    if not all(map(math.isfinite, box)):
        return "has a coordinate that is not finite"
    if x1 <= x0 or y1 <= y0:
        return f"is empty or inverted (width {x1 - x0:g}, height {y1 - y0:g})"
    if x1 <= 0 or y1 <= 0 or x0 >= width or y0 >= height:
        return f"lies wholly outside the image of {width}x{height} pixels"
    return None
