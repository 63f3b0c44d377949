"""What every data source shares: the one error type and the check of boxes and categories."""

import logging
import math
from collections.abc import Sequence

logger = logging.getLogger(__name__)

MAX_REPORTED = 10
SKIP_HINT = "Correct the annotation, or set DATASETS.SKIP_BAD_BOXES True to leave such boxes out."


class DataError(ValueError):
    """Data that cannot be used as it is; the message names the file, the object and the remedy."""


class BadBoxError(DataError):
    """An object whose box can't be trained on, and which can be left out without its image."""


def box_problem(box: Sequence[float], width: int, height: int) -> str | None:
    """Say what is wrong with a box, in words.

    Args:
        box: continuous 0-based (x0, y0, x1, y1) in pixels.
        width, height: of the image, in pixels.

    Returns:
        None if the box has an area and meets the image; else the reason. A box that sticks out of
        the image is fine: it is clipped when the image is read.
    """
    x0, y0, x1, y1 = box
    if not all(math.isfinite(v) for v in box):
        return "has a coordinate that is not finite"
    if x1 <= x0 or y1 <= y0:
        return f"is empty or inverted (width {x1 - x0:g}, height {y1 - y0:g})"
    if x1 <= 0 or y1 <= 0 or x0 >= width or y0 >= height:
        return f"lies wholly outside the image of {width}x{height} pixels"
    return None


class Problems:
    """Bad boxes of one source: collected and raised together, or left out and counted."""

    def __init__(self, source: str, skip: bool):
        """
        Args:
            source: name of the data source, for the message.
            skip: whether bad boxes are left out with one logged count instead of an error.
        """
        self.source = source
        self.skip = skip
        self.messages: list[str] = []

    def add(self, message: str) -> None:
        """Note one bad box; `message` names its file and object."""
        self.messages.append(message)

    def finish(self) -> None:
        """Raise or log what was collected.

        Raises:
            DataError: there are bad boxes and they are not to be skipped.
        """
        if not self.messages:
            return
        shown = self.messages[:MAX_REPORTED]
        count = len(self.messages)
        rest = [] if count <= MAX_REPORTED else [f"... and {count - MAX_REPORTED} more"]
        listing = "\n  ".join([*shown, *rest])
        if not self.skip:
            raise DataError(f"{count} bad box(es) in {self.source}:\n  {listing}\n{SKIP_HINT}")
        logger.warning("%s: left out %d bad box(es):\n  %s", self.source, count, listing)
