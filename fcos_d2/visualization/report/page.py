"""Draws the pictures and the HTML report of a run."""

import datetime
import logging
import numbers
import os
import re
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from ...evaluation import analysis
from ...evaluation.results import METRICS_FILE
from ...files import atomic_path
from ...version import __version__
from ..curves import plot_training_curves
from ..detections import draw_detection_grid
from . import sections
from .gather import Evaluation, Run, explain, gather_run

CURVES_FILE = "training_curves.png"
DETECTIONS_FILE = "detections.png"
REPORT_FILE = "report.html"

logger = logging.getLogger(__name__)


class Section(NamedTuple):
    """A section of the page; ``missing`` is the reason if it has no content."""

    anchor: str
    title: str
    html: str = ""
    missing: str | None = None
    parts: list["Section"] = []


def write_report(output_dir: str | os.PathLike) -> list[Path]:
    """Draw ``training_curves.png``, ``detections.png`` and ``report.html`` of a run.

    They are written into the output folder, each atomically. Further test sets get
    ``detections_<slug>.png``. If a file cannot be drawn, the reason is logged and the others are
    drawn; a section of the report without its inputs names them.

    Args:
        output_dir: OUTPUT_DIR of a run, trained or evaluated.

    Returns:
        The files written.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: it is not the output folder of a run.
    """
    run = gather_run(output_dir)
    logger.info("Report of %s: %d test set(s)", run.folder, len(run.evaluations))
    curves = partial(plot_training_curves, run.folder / METRICS_FILE)
    drawings: dict[str, Callable[[Path], None]] = {CURVES_FILE: curves}
    for i, evaluation in enumerate(run.evaluations):
        file = f"detections_{evaluation.slug}.png" if i else DETECTIONS_FILE
        drawings[file] = partial(_draw_detections, evaluation)
    drawings[REPORT_FILE] = partial(_write_page, run)
    written = []
    for file, draw in drawings.items():
        path, start = Path(output_dir) / file, time.perf_counter()
        try:
            draw(path)
        except Exception as error:
            logger.warning("%s not written: %s", file, explain(error))
        else:
            written.append(path)
            logger.info("%s: %.1f s", path, time.perf_counter() - start)
    return written


def _draw_detections(evaluation: Evaluation, path: Path) -> None:
    draw_detection_grid(*sections.analysis_inputs(evaluation), path)


def _write_page(run: Run, path: Path) -> None:
    page = (
        _templates()
        .get_template("report.html.j2")
        .render(
            name=run.folder.name,
            datasets=", ".join(evaluation.dataset for evaluation in run.evaluations),
            date=f"{run.date:%Y-%m-%d %H:%M}",
            written=f"{datetime.datetime.now():%Y-%m-%d %H:%M}",
            version=__version__,
            sections=[
                _section("summary", "Summary", sections.summary, run),
                _section("curves", "Training", sections.training, run),
                *map(_evaluation_section, run.evaluations),
                _section("assignment", "Assignment of locations", sections.assignment, run),
                _section("run", "Commands and configuration", sections.provenance, run),
            ],
        )
    )
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _evaluation_section(evaluation: Evaluation) -> Section:
    slug, title = evaluation.slug, f"Results on {evaluation.dataset}"
    if evaluation.proposal_recall is not None:
        return Section(slug, title, missing=evaluation.problems["tables"])

    def part(anchor: str, title: str, compute: Callable[..., dict], *args: Any) -> Section:
        return _section(f"{slug}-{anchor}", title, compute, evaluation, *args)

    parts = [part("ap", "AP", sections.tables)]
    try:
        curves = analysis.precision_recall(*sections.analysis_inputs(evaluation))
        score_thresh = sections.best_threshold(evaluation)
    except Exception as error:
        missing = f"No analysis: {explain(error)}"
        logger.warning("%s: %s", title, missing)
        return Section(slug, title, missing=missing, parts=parts)
    parts += [
        part("pr", "Precision and recall", sections.precision_recall, curves),
        part("confusion", "Confusion of classes", sections.confusion, score_thresh),
        part("errors", "AP lost by type of error", sections.errors),
        part("calibration", "Calibration and score thresholds", sections.calibration, curves),
        part("images", "Best, typical and worst images", sections.images, score_thresh),
    ]
    return Section(slug, title, parts=parts)


def _section(
    anchor: str, title: str, compute: Callable[..., dict[str, Any]], *args: Any
) -> Section:
    """Render the macro named like ``compute`` with the values that it returns.

    A report is read when something went wrong, so an error of any kind costs only this section.
    """
    start = time.perf_counter()
    try:
        macro = getattr(_templates().get_template("sections.html.j2").module, compute.__name__)
        html = macro(anchor, **compute(*args))
    except Exception as error:
        missing = explain(error)
        logger.warning("%s: %s", title, missing)
        return Section(anchor, title, missing=missing)
    logger.info("%s: %.1f s", title, time.perf_counter() - start)
    return Section(anchor, title, html)


@cache
def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(breakable=_breakable, cell=_cell)
    return environment


def _cell(value: Any, digits: int = 1) -> str:
    """Format a value: text and integers as they are, a dash for None and nan."""
    if value is None or value != value:
        return "–"
    if isinstance(value, (str, numbers.Integral)):
        return str(value)
    return f"{value:.{digits}f}"


def _breakable(text: str) -> Markup:
    """Escape text and allow line breaks after the punctuation in names of keys and files."""
    return Markup("<wbr>").join(re.split(r"(?<=[._/:])(?=[^\W\d_])", text))
