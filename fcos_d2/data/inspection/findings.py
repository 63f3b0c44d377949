"""`Finding`: something wrong or odd in a data set, with the file and the line where it is."""

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple
from xml.parsers import expat

from ..checks import SKIP_HINT

_LARGER = (
    "Larger images (INPUT.MIN_SIZE_TRAIN and INPUT.MIN_SIZE_TEST, and their MAX_SIZE), or a finer "
    "level (P2: see 'Any backbone' in the README) have room for small objects; larger bounds in "
    "MODEL.FCOS.SIZES_OF_INTEREST keep long thin ones on finer levels."
)
# What to do about each kind of finding.
ADVICE = {
    "source": "",  # this and the next two kinds say so themselves
    "bad file": "",
    "bad object": "",
    "config": "",
    "bad box": SKIP_HINT,
    "bad image": "Replace the file, or take the image out of the data set.",
    "image size": "Correct width and height, and look whether the boxes are of the same scale.",
    "listed twice": "Keep one of them.",
    "box sticks out": "What is outside is cut off when the image is read: correct the box if the "
    "object does not really end at the border.",
    "box from 0": "VOC counts pixels from 1, so a box that begins at 0 was probably written by a "
    "program that counts from 0, and all of its boxes are one pixel too far to the left and the "
    "top. Add 1 to xmin and ymin (and to xmax and ymax, if they name the last pixel and count "
    "from 0, too).",
    "same box": "Delete one: at each location one object is learnt, so the other one has none, and "
    "counts as missed in the evaluation.",
    "same picture": "Keep one of them, with the objects of both.",
    "same picture in two sources": "Where one is trained on and the other one tested on, the "
    "result is too good: take it out of one.",
    "classes": "All data sets of a run need the same classes in the same order: put the same "
    "classes.txt (one name a line) into all folders, or give the json files the same categories.",
    "background class": "FCOS has no class for the background: take it out of the class names.",
    "class name twice": "Give each class one category: merge them, or rename one.",
    "no objects": "INPUT.DIFFICULT train learns difficult objects; crowd regions are never learnt.",
    "class without objects": "The model can't learn it: add images, or take it out of the class "
    "names (classes.txt, 'categories').",
    "rare classes": "DATALOADER.SAMPLER_TRAIN RepeatFactorTrainingSampler with a "
    "DATALOADER.REPEAT_THRESHOLD of, say, 0.1 shows their images more often.",
    "images without objects": "They are trained as background "
    "(DATALOADER.FILTER_EMPTY_ANNOTATIONS True leaves them out): see that no annotation was lost.",
    "no training location": f"At this scale nothing learns it. {_LARGER}",
    "no location of its own": "At this scale nothing learns it: a location learns the "
    "smallest object around it, and another one has nearly the same centre. At a larger scale "
    "(INPUT.MIN_SIZE_TRAIN) they may part; nothing need be wrong with such an object.",
    "below the finest stride": f"It has few locations. {_LARGER}",
    "coverage": _LARGER,
}


class Place(NamedTuple):
    """Where something is, before its line is looked up.

    Attributes:
        file: its path.
        kind: "object" or "size", an element of a VOC annotation; "images", "annotations" or
            "categories", an item of that list in a COCO file; "line"; or "", no line.
        index: which of these it is, from 0; for "line" its number, from 1.
        words: what to call it, "object 2 (dog)".
    """

    file: str
    kind: str = ""
    index: int = 0
    words: str = ""


class Note(NamedTuple):
    """A finding before its line is looked up; ``kind`` is a key of ``ADVICE``."""

    severity: str
    place: Place
    message: str
    kind: str


class Finding(NamedTuple):
    """Something that is wrong ("error": training stops or goes wrong) or odd ("warning").

    Attributes:
        severity: "error" or "warning".
        file: path, or the name of a source.
        line: from 1; None where there is no line, as in an image.
        message: what is there.
        kind: findings of a kind have one advice, ``ADVICE[kind]``.
    """

    severity: str
    file: str
    line: int | None
    message: str
    kind: str


def locate(notes: Sequence[Note]) -> list[Finding]:
    """Look up the lines of all notes; each file is read once."""
    wanted = defaultdict(list)
    lines: dict[Place, int | None] = {}
    for note in notes:
        wanted[note.place.file].append(note.place)
    for file, places in wanted.items():
        kinds = {place.kind for place in places}
        table: dict[str, list[int]] = {}
        if kinds & {"object", "size"}:
            table = xml_lines(file, ("object", "size"))
        elif kinds & {"images", "annotations", "categories"}:
            table = json_lines(file)
        for place in places:
            known = table.get(place.kind, [])
            line = known[place.index] if place.index < len(known) else None
            lines[place] = place.index if place.kind == "line" else line
    return [Finding(x.severity, x.place.file, lines[x.place], x.message, x.kind) for x in notes]


def format_findings(findings: Sequence[Finding], limit: int | None = 10) -> str:
    """Return the findings as text: errors first, each kind with its count and its advice.

    Args:
        findings: in the order in which those of a kind are listed.
        limit: how many of a kind are listed; None lists all.
    """
    groups: dict[tuple[str, str], list[Finding]] = defaultdict(list)
    for finding in findings:
        groups[finding.severity, finding.kind].append(finding)
    lines = []
    order = list(ADVICE)
    for (severity, kind), group in sorted(
        groups.items(), key=lambda x: (x[0][0], order.index(x[0][1]))
    ):
        lines.append(f"{severity}: {kind} ({len(group)})")
        for x in group[:limit]:
            line = "" if x.line is None else f":{x.line}"
            message = x.message if x.file in x.message else f"{x.file}{line}: {x.message}"
            lines.append("  " + message.replace("\n", "\n  "))
        if limit is not None and len(group) > limit:
            lines.append(f"  ... and {len(group) - limit} more")
        if ADVICE[kind]:
            lines.append(f"  -> {ADVICE[kind]}")
    return "\n".join(lines)


def xml_lines(path: str, tags: Sequence[str]) -> dict[str, list[int]]:
    """Return the lines on which the elements of each tag begin, in document order."""
    lines: dict[str, list[int]] = {tag: [] for tag in tags}
    parser = expat.ParserCreate()

    def start(name: str, _: dict) -> None:
        tag = name.rpartition(":")[2]  # a namespace
        if tag in lines:
            lines[tag].append(parser.CurrentLineNumber)

    parser.StartElementHandler = start
    with open(path, "rb") as file:
        parser.ParseFile(file)
    return lines


_BLANK = re.compile(r"\s*")


def json_lines(path: str) -> dict[str, list[int]]:
    """Return the lines on which the items of each top-level list of a JSON object begin."""
    with open(path, encoding="utf-8") as file:
        text = file.read()
    decoder = json.JSONDecoder()
    lines: dict[str, list[int]] = {}
    at = _skip(text, _skip(text, 0) + 1)
    while text[at] != "}":
        key, at = decoder.raw_decode(text, at)
        at = _skip(text, _skip(text, at) + 1)  # over the colon
        if text[at] == "[":
            starts, at = _item_starts(decoder, text, at)
            lines[key] = _lines_of(text, starts)
        else:
            _, at = decoder.raw_decode(text, at)
        at = _skip(text, at)
        if text[at] == ",":
            at = _skip(text, at + 1)
    return lines


def _item_starts(decoder: json.JSONDecoder, text: str, at: int) -> tuple[list[int], int]:
    """Return where the items of the list at ``at`` begin, and where the list ends."""
    starts = []
    at = _skip(text, at + 1)
    while text[at] != "]":
        starts.append(at)
        _, at = decoder.raw_decode(text, at)
        at = _skip(text, at)
        if text[at] == ",":
            at = _skip(text, at + 1)
    return starts, at + 1


def _skip(text: str, at: int) -> int:
    return _BLANK.match(text, at).end()


def _lines_of(text: str, starts: Sequence[int]) -> list[int]:
    lines, line, before = [], 1, 0
    for start in starts:
        line += text.count("\n", before, start)
        lines.append(line)
        before = start
    return lines
