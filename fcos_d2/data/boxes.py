"""Boxes of dataset records."""

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
    box = np.array([annotation["bbox"]], dtype=np.float64)  # a list would be rounded to float32
    return BoxMode.convert(box, annotation["bbox_mode"], BoxMode.XYWH_ABS)[0].tolist()
