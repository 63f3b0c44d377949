"""Everything that is wrong or odd in data sources: the checks of training, gone through to the end.

The loaders stop at the first error; here each one becomes a :class:`Finding` with file and line.
"""

from .checks import (
    check_boxes,
    check_classes,
    check_coverage,
    check_images,
    count_objects,
    describe_sizes,
)
from .findings import ADVICE, Finding, Note, Place, format_findings, locate
from .reading import Source, read_source

__all__ = [
    "ADVICE",
    "Finding",
    "Note",
    "Place",
    "Source",
    "check_boxes",
    "check_classes",
    "check_coverage",
    "check_images",
    "count_objects",
    "describe_sizes",
    "format_findings",
    "locate",
    "read_source",
]
