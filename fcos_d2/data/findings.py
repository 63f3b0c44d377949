"""`Source`, the content of a data source, and `Finding`, a problem in it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

SKIP_HINT = "Correct the annotation, or set DATASETS.SKIP_BAD_BOXES True to skip such boxes."
_MAX_REPORTED = 10


class Finding(NamedTuple):
    """A problem in a data source.

    Attributes:
        severity: "error" (training stops or goes wrong) or "warning".
        kind: key of ``ADVICE`` in :mod:`.inspection.listing`, the remedy.
        file: path, or name of a source.
        message: the object, the problem and, if it is not that of the kind, the remedy.
        item: element of ``file``, whose line can be looked up: ("object", k) or ("size", 0) in a
            VOC annotation, ("images", k), ("annotations", k) or ("categories", k) in a COCO file.
        line: counted from 1; None if there is none or it has not been looked up.
    """

    severity: str
    kind: str
    file: str
    message: str
    item: tuple[str, int] | None = None
    line: int | None = None

    def __str__(self) -> str:
        if self.kind == "source" or self.file in self.message:
            return self.message
        return f"{self.file}{'' if self.line is None else f':{self.line}'}: {self.message}"


class DataError(ValueError):
    """Data that can't be used. The message names file, object and remedy of each error."""

    @classmethod
    def of(cls, name: str, errors: Sequence[Finding]) -> "DataError":
        """Join the errors of the source ``name``: the first ten, and the number of the others."""
        lines = [str(error) for error in errors[:_MAX_REPORTED]]
        if len(errors) > 1:
            lines = [f"{len(errors)} errors in {name}:", *(f"  {line}" for line in lines)]
        if len(errors) > _MAX_REPORTED:
            lines.append(f"  ... and {len(errors) - _MAX_REPORTED} more: tools/check_dataset.py")
        if any(error.kind == "bad box" for error in errors):
            lines.append(SKIP_HINT)
        return cls("\n".join(lines))


class ObjectError(Exception):
    """An object that can't be trained on; ``kind`` is that of its finding."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


class Origin(NamedTuple):
    """Where a record was read.

    Attributes:
        file: the annotation file; the image if a function of the user makes the records.
        item: element of ``file`` that describes the image, as in :class:`Finding`.
        element: "object" (VOC) or "annotations" (COCO); "" without an annotation file.
        indices: position in ``file`` of each annotation of the record.
    """

    file: str
    item: tuple[str, int] | None
    element: str
    indices: list[int]


@dataclass
class Source:
    """Content of a data source.

    Attributes:
        name: as in DATASETS.
        class_names: in the order of the ids; empty if they could not be read.
        records: Detectron2 dataset dicts of the images without an error of their own, with the
            objects that can be trained on.
        origins: of each record.
        findings: problems that the reader found.
        metadata: attributes for the source's ``Metadata`` besides ``thing_classes``.
        is_logged: whether its skipped boxes have been logged.
    """

    name: str
    class_names: list[str] = field(default_factory=list)
    records: list[dict] = field(default_factory=list)
    origins: list[Origin] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)
    is_logged: bool = False

    def error(self, kind: str, file: object, message: str, **options: Any) -> None:
        """Add an error; ``options`` are ``item`` and ``line`` of :class:`Finding`."""
        self.findings.append(Finding("error", kind, str(file), message, **options))

    def label(self, record: int, k: int) -> str:
        """Return the words for annotation ``k`` of a record: "object 2 (dog)"."""
        origin = self.origins[record]
        index = origin.indices[k]
        name = self.class_names[self.records[record]["annotations"][k]["category_id"]]
        words = (
            f"annotations[{index}]" if origin.element == "annotations" else f"object {index + 1}"
        )
        return f"{words} ({name})"

    def object_warning(self, kind: str, record: int, k: int, text: str) -> Finding:
        """Return a warning about annotation ``k`` of a record; ``text`` follows its label."""
        origin = self.origins[record]
        item = (origin.element, origin.indices[k]) if origin.element else None
        return Finding("warning", kind, origin.file, self.label(record, k) + text, item)


def apply_policy(findings: Sequence[Finding], skip_bad_boxes: bool) -> list[Finding]:
    """Return the findings under DATASETS.SKIP_BAD_BOXES, with which bad boxes are warnings."""
    return [
        x._replace(severity="warning") if skip_bad_boxes and x.kind == "bad box" else x
        for x in findings
    ]
