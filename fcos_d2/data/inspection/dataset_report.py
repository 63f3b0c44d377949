"""Report on the data of a run: tables, problems, and the objects that training can learn."""

from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd
from detectron2.config import CfgNode

from ...config import check_training, set_num_classes
from ..dataset_mapper import DetectionDatasetMapper
from ..findings import Finding, Source, apply_policy
from ..sources import read_source
from .assignment import Assignment, assignment_table, summarize_assignment
from .checks import (
    check_boxes,
    check_classes,
    check_coverage,
    check_images,
    count_objects,
    describe_sizes,
)
from .listing import ADVICE, format_findings, locate

_FIELDS = ("severity", "file", "line", "message", "kind")  # of a finding in the json file


class DatasetReport(NamedTuple):
    """Content and problems of the data of a run.

    Attributes:
        sources: in the order in which they were named.
        findings: errors and warnings of all sources.
        assignments: of each training source, by its name.
    """

    sources: list[Source]
    findings: list[Finding]
    assignments: dict[str, Assignment]

    @property
    def num_errors(self) -> int:
        """Number of findings with which training would stop or go wrong."""
        return sum(x.severity == "error" for x in self.findings)


def inspect_datasets(
    cfg: CfgNode, train: Sequence[str], test: Sequence[str], *, min_size: int | None = None
) -> DatasetReport:
    """Read the sources of a run as training does, decode every image, and match the objects.

    Args:
        cfg: the recipe; its DATASETS.TRAIN and TEST are not used.
        train: names of the training sources.
        test: names of the test sources.
        min_size: shorter edge of the images in the network, for the matching; None takes the
            middle of INPUT.MIN_SIZE_TRAIN.
    """
    sources = {name: read_source(name) for name in dict.fromkeys((*train, *test))}
    trained, tested = ([sources[name] for name in names] for names in (train, test))
    findings = []
    for source in sources.values():
        findings += apply_policy(source.findings, cfg.DATASETS.SKIP_BAD_BOXES)
    for source in sources.values():
        findings += check_boxes(source)
    findings += check_images(list(sources.values()), cfg.INPUT.FORMAT)
    findings += check_classes(trained, tested, cfg.INPUT.DIFFICULT)
    findings += _check_config(cfg, trained)
    assignments = {}
    for source in trained:
        try:
            assignment = assignment_table(source.records, cfg, min_size=min_size)
        except ValueError as error:  # the levels don't fit together
            findings.append(_config_error(error))
            break
        assignments[source.name] = assignment
        findings += check_coverage(source, assignment)
    return DatasetReport(list(sources.values()), locate(findings), assignments)


def _check_config(cfg: CfgNode, train: Sequence[Source]) -> list[Finding]:
    """Compare the recipe with the classes, as training does."""
    cfg = cfg.clone()
    cfg.defrost()
    try:
        if train and train[0].class_names:
            set_num_classes(cfg, train[0].name, train[0].class_names)
        check_training(cfg)
        DetectionDatasetMapper(cfg)
    except ValueError as error:
        return [_config_error(error)]
    return []


def _config_error(error: ValueError) -> Finding:
    return Finding("error", "config", "the recipe", str(error))


def format_report(report: DatasetReport) -> str:
    """Return the report as text: tables of each source, then the findings."""
    parts = []
    for source in report.sources:
        if source.records:
            parts += _format_source(source, report.assignments.get(source.name))
    if report.findings:
        parts.append(format_findings(report.findings))
    warnings = len(report.findings) - report.num_errors
    counts = [(report.num_errors, "error"), (warnings, "warning")]
    parts.append(", ".join(f"{n} {word}{'s' * (n != 1)}" for n, word in counts))
    return "\n\n".join(parts) + "\n"


def _format_source(source: Source, assignment: Assignment | None) -> list[str]:
    classes = count_objects(source)
    parts = [f"{source.name}: {len(source.records)} images, {classes['objects'].sum()} objects"]
    parts.append(_table(describe_sizes(source), ".4g"))
    if assignment is None or assignment.objects.empty:
        return [*parts, _table(classes, ".1f")]
    summary = summarize_assignment(assignment, source.class_names)
    learned = summary["class"].drop(columns="objects")
    # By position: a name may be there twice.
    classes = pd.concat([classes.reset_index(), learned.reset_index(drop=True)], axis=1)
    parts.append(_table(classes.set_index("class"), ".1f"))
    coverage = 100 * (assignment.objects["positives"] > 0).mean()
    share = 100 * assignment.ambiguous / max(assignment.num_locations, 1)
    parts.append(
        f"Training at {assignment.image_scale}: {coverage:.2f} % of "
        f"{len(assignment.objects)} objects have a location (coverage); "
        f"{assignment.num_locations} locations, {assignment.ambiguous} ({share:.1f} %) inside "
        "more than one object"
    )
    return [*parts, _table(summary["size"], ".1f"), _table(summary["level"], ".1f")]


def _table(table: pd.DataFrame, number_format: str) -> str:
    table = table.rename(columns=lambda x: str(x).replace("_", " "))
    # A nan has no objects to measure.
    table = table.astype(object).where(table.notna(), None)
    return table.to_markdown(floatfmt=number_format, missingval="-")


def report_content(report: DatasetReport) -> dict:
    """Return the whole report as data for a json file."""
    sources = {}
    for source in report.sources:
        content: dict = {"images": len(source.records), "class_names": source.class_names}
        if source.records:
            content["classes"] = _rows(count_objects(source))
            content["pixels"] = describe_sizes(source).to_dict("index")
        if assignment := report.assignments.get(source.name):
            summary = summarize_assignment(assignment, source.class_names)
            content["assignment"] = {
                "image_scale": assignment.image_scale,
                "locations": assignment.num_locations,
                "ambiguous": assignment.ambiguous,
                "levels": _rows(assignment.levels),
                **{key: _rows(table) for key, table in summary.items()},
            }
        sources[source.name] = content
    kinds = {finding.kind for finding in report.findings}
    return {
        "sources": sources,
        "findings": [{key: getattr(x, key) for key in _FIELDS} for x in report.findings],
        "advice": {kind: text for kind, text in ADVICE.items() if kind in kinds and text},
        "errors": report.num_errors,
        "warnings": len(report.findings) - report.num_errors,
    }


def _rows(table: pd.DataFrame) -> list[dict]:
    return table.reset_index().to_dict("records")
