"""Findings as text: their lines in the files, and the remedy of each kind."""

import re
from collections import defaultdict
from collections.abc import Sequence
from json import JSONDecoder
from xml.parsers import expat

from ..findings import SKIP_HINT, Finding

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


def locate(findings: Sequence[Finding]) -> list[Finding]:
    """Look up the lines of findings; each file is read once."""
    wanted: dict[str, set[str]] = defaultdict(set)
    for finding in findings:
        if finding.item is not None:
            wanted[finding.file].add(finding.item[0])
    tables = {
        file: xml_lines(file) if elements & {"object", "size"} else json_lines(file)
        for file, elements in wanted.items()
    }
    return [
        x if x.item is None else x._replace(line=_line(tables[x.file], *x.item)) for x in findings
    ]


def _line(table: dict[str, list[int]], element: str, index: int) -> int | None:
    lines = table.get(element, [])
    return lines[index] if index < len(lines) else None


def format_findings(findings: Sequence[Finding], limit: int | None = 10) -> str:
    """Return the findings as text: errors first, each kind with its count and its remedy.

    Args:
        findings: in the order in which those of a kind are listed.
        limit: how many of a kind are listed; None lists all.
    """
    groups: dict[tuple[str, str], list[Finding]] = defaultdict(list)
    for finding in findings:
        groups[finding.severity, finding.kind].append(finding)
    order = {kind: number for number, kind in enumerate(ADVICE)}
    lines = []
    for (severity, kind), group in sorted(groups.items(), key=lambda x: (x[0][0], order[x[0][1]])):
        lines.append(f"{severity}: {kind} ({len(group)})")
        lines += ["  " + str(x).replace("\n", "\n  ") for x in group[:limit]]
        if limit is not None and len(group) > limit:
            lines.append(f"  ... and {len(group) - limit} more")
        if ADVICE[kind]:
            lines.append(f"  -> {ADVICE[kind]}")
    return "\n".join(lines)


def xml_lines(path: str) -> dict[str, list[int]]:
    """Return the lines on which the elements of each tag begin, in document order."""
    lines: dict[str, list[int]] = defaultdict(list)
    parser = expat.ParserCreate()

    def start(tag: str, _: dict) -> None:
        lines[tag.rpartition(":")[2]].append(parser.CurrentLineNumber)  # without a namespace

    parser.StartElementHandler = start
    with open(path, "rb") as file:
        parser.ParseFile(file)
    return lines


def json_lines(path: str) -> dict[str, list[int]]:
    """Return the lines on which the items of each top-level list of a JSON object begin."""
    with open(path, encoding="utf-8") as file:
        text = file.read()
    decode, gap = JSONDecoder().raw_decode, re.compile(r"[\s,:]*")

    def skip(at: int) -> int:
        """Return the index behind spaces, commas and colons."""
        match = gap.match(text, at)
        assert match is not None
        return match.end()

    lines: dict[str, list[int]] = {}
    line, counted = 1, 0
    at = text.index("{") + 1
    while text[at := skip(at)] != "}":
        key, at = decode(text, at)
        at = skip(at)
        if text[at] != "[":
            _, at = decode(text, at)
            continue
        lines[key] = []
        at += 1
        while text[at := skip(at)] != "]":
            line, counted = line + text.count("\n", counted, at), at
            lines[key].append(line)
            _, at = decode(text, at)
        at += 1
    return lines
