"""Findings as text: their lines in the files, and the remedy of each kind."""

import re
from collections import defaultdict
from collections.abc import Sequence
from json import JSONDecoder
from xml.parsers import expat

from ..findings import SKIP_HINT, Finding

_MAX_LISTED = 10
_LARGER = (
    "Larger images (INPUT.MIN_SIZE_TRAIN and INPUT.MIN_SIZE_TEST, and their MAX_SIZE) or a finer "
    "level (P2, see docs/extending.md) give small objects locations; larger bounds in "
    "MODEL.FCOS.SIZES_OF_INTEREST keep long thin objects on finer levels."
)
# Remedy of each kind of finding; messages of the first kinds name their own.
ADVICE = {
    "source": "",
    "bad file": "",
    "bad object": "",
    "config": "",
    "bad box": SKIP_HINT,
    "bad image": "Replace the file, or remove the image from the data set.",
    "image size": "Correct width and height, and check whether the boxes are of the same scale.",
    "listed twice": "Keep one of them.",
    "box sticks out": "The part outside is clipped when the image is read: correct the box if the "
    "object does not end at the border.",
    "box from 0": "VOC counts pixels from 1, so a box that starts at 0 was probably written by a "
    "program that counts from 0, and all of its boxes are one pixel too far left and up. Add 1 to "
    "xmin and ymin (and to xmax and ymax, if they name the last pixel counted from 0, too).",
    "same box": "Delete one: a location learns one object, so the other gets none and counts as "
    "missed in the evaluation.",
    "same picture": "Keep one of them, with the objects of both.",
    "same picture in two sources": "If one is for training and the other for testing, the result "
    "is too good: remove it from one.",
    "classes": "All data sets of a run need the same classes in the same order: put the same "
    "classes.txt (one name per line) into all folders, or give the json files the same categories.",
    "background class": "FCOS has no background class: remove it from the class names.",
    "class name twice": "Give each class one category: merge them, or rename one.",
    "no objects": "INPUT.DIFFICULT train learns difficult objects; crowds are never learned.",
    "class without objects": "The model can't learn it: add images, or remove it from the class "
    "names (classes.txt, 'categories').",
    "rare classes": "DATALOADER.SAMPLER_TRAIN RepeatFactorTrainingSampler with a "
    "DATALOADER.REPEAT_THRESHOLD such as 0.1 shows their images more often.",
    "images without objects": "They are trained as background "
    "(DATALOADER.FILTER_EMPTY_ANNOTATIONS True excludes them): see that no annotation is missing.",
    "no training location": f"No location learns it at this scale. {_LARGER}",
    "no location of its own": "No location learns it at this scale: a location learns the smallest "
    "object around it, and another object has nearly the same center. A larger scale "
    "(INPUT.MIN_SIZE_TRAIN) may separate them; the annotation is not necessarily wrong.",
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
    found = []
    for finding in findings:
        if finding.item is not None:
            element, index = finding.item
            lines = tables[finding.file].get(element, [])[index:]
            finding = finding._replace(line=lines[0] if lines else None)
        found.append(finding)
    return found


def format_findings(findings: Sequence[Finding]) -> str:
    """Return the findings as text: errors first, per kind its count, ten of them and the remedy."""
    groups: dict[tuple[str, str], list[Finding]] = defaultdict(list)
    for finding in findings:
        groups[finding.severity, finding.kind].append(finding)
    order = {kind: number for number, kind in enumerate(ADVICE)}
    lines = []
    for (severity, kind), group in sorted(groups.items(), key=lambda x: (x[0][0], order[x[0][1]])):
        lines.append(f"{severity}: {kind} ({len(group)})")
        lines += ["  " + str(x).replace("\n", "\n  ") for x in group[:_MAX_LISTED]]
        if len(group) > _MAX_LISTED:
            lines.append(f"  ... and {len(group) - _MAX_LISTED} more")
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
