"""What the template can show: sections, and the blocks that they are made of."""

import logging
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from .figures import Picture
from .pictures import Shot
from .tables import Table

logger = logging.getLogger(__name__)


class Text(NamedTuple):
    """A paragraph."""

    text: str
    kind: str = "text"


class Tiles(NamedTuple):
    """The main numbers, each with its name, and lines about what they were measured on."""

    title: str
    values: list[tuple[str, str]]
    notes: list[str]
    kind: str = "tiles"


class Figures(NamedTuple):
    """Pictures with a title each.

    ``layout``: "two" in columns, "small" for many small ones, "wide" for one that keeps its size
    and is scrolled where it does not fit.
    """

    items: list[tuple[str, Picture]]
    layout: str = "two"
    kind: str = "figures"


class Beside(NamedTuple):
    """Pictures with their titles and tables, beside each other where there is room."""

    items: list[tuple[str, Picture] | Table]
    kind: str = "beside"


class Shots(NamedTuple):
    """Images that open larger on a click."""

    title: str
    shots: list[Shot]
    kind: str = "shots"


class Folded(NamedTuple):
    """Plain text that opens on a click."""

    title: str
    text: str
    kind: str = "folded"


Block = Text | Tiles | Figures | Beside | Shots | Folded


class Section(NamedTuple):
    """A part of the report; ``missing`` tells why it has no blocks."""

    anchor: str
    title: str
    blocks: Sequence[Block] = ()
    missing: str | None = None
    parts: Sequence["Section"] = ()


def build_section(anchor: str, title: str, build: Callable[[], Sequence[Block]]) -> Section:
    """A section of what ``build`` gives; if it raises, the section says what is missing."""
    start = time.perf_counter()
    try:
        section = Section(anchor, title, build())
    except Exception as error:
        return Section(anchor, title, missing=explain(error, title))
    logger.info("%s: %.1f s", title, time.perf_counter() - start)
    return section


def explain(error: Exception, title: str) -> str:
    """Log and return why a part of the report is missing.

    A report is read where something went wrong, so no error of any kind in one part may cost the
    others. One that was not foreseen is logged with its traceback.
    """
    message = " ".join(str(error).split())
    if isinstance(error, (OSError, ValueError)):
        logger.warning("%s: %s", title, message)
        return message
    logger.exception("%s could not be made:", title)
    return f"could not be made: {type(error).__name__}: {message}"
