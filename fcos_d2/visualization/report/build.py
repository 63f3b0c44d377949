"""The pictures and the report of a run, drawn from its folder."""

import datetime
import logging
import os
import re
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup

from ...data.inspection.assignment import Assignment, assignment_table, summarize_assignment
from ...files import atomic_path
from ...version import __version__
from ..curves import plot_training_curves
from ..detections import draw_detection_grid
from ..overlays import draw_assignment
from . import figures
from .blocks import Beside, Block, Figures, Folded, Shots, Text, build_section, explain
from .gather import Results, Run, changed_settings, describe_checkpoints, gather_run, load_source
from .pictures import Shot, jpeg
from .results import result_sections, result_tiles
from .tables import table

CURVES_FILE = "training_curves.png"
DETECTIONS_FILE = "detections.png"
REPORT_FILE = "report.html"

logger = logging.getLogger(__name__)

_MAX_ASSIGNED = 5000  # images; COCO's 118 000 would take many minutes to the same shares
_NUM_OVERLAYS = 6
_OVERLAY_SIDE = 800  # pixels; locations are dots of a few
_ASSIGNMENT_COLUMNS = {
    "coverage": "with a location, %",
    "positives_mean": "locations, mean",
    "positives_median": "median",
}


def write_report(output_dir: str | os.PathLike) -> list[Path]:
    """Draw ``training_curves.png``, ``detections.png`` and ``report.html`` of a run.

    They are written into the run's folder, each atomically. The second and further test sets get
    ``detections_<slug>.png``. A file that cannot be made is logged with the reason, and the others
    are written; a section of the report without its inputs says what is missing.

    Args:
        output_dir: OUTPUT_DIR of a run, trained or evaluated.

    Returns:
        The files written.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: it is not the folder of a run.
    """
    run = gather_run(output_dir)
    logger.info("Report of %s: %d test set(s)", run.folder, len(run.results))
    drawings: dict[str, Callable[[Path], None]] = {CURVES_FILE: partial(_draw_curves, run)}
    for results in run.results:
        file = f"detections_{results.slug}.png" if DETECTIONS_FILE in drawings else DETECTIONS_FILE
        drawings[file] = partial(_draw_detections, results)
    drawings[REPORT_FILE] = partial(_write_page, run)
    written = []
    for file, draw in drawings.items():
        path, start = Path(output_dir) / file, time.perf_counter()
        try:
            draw(path)
        except Exception as error:
            explain(error, file)
            continue
        written.append(path)
        logger.info("%s: %.1f s", path, time.perf_counter() - start)
    return written


def _draw_curves(run: Run, path: Path) -> None:
    if "history" in run.problems:
        raise ValueError(run.problems["history"])
    plot_training_curves(run.folder / "metrics.json", path)


def _draw_detections(results: Results, path: Path) -> None:
    for problem in results.problems.values():
        raise ValueError(problem)
    draw_detection_grid(results.records, results.predictions, results.class_names, path)


def _write_page(run: Run, path: Path) -> None:
    sections = [
        build_section("summary", "Summary", partial(_summary, run)),
        build_section("curves", "Training", partial(_curves, run)),
        *(result_sections(results) for results in run.results),
        build_section("assignment", "Assignment of locations", partial(_assignment, run)),
        build_section("run", "The run", partial(_run, run)),
    ]
    page = _template().render(
        name=run.name,
        datasets=", ".join(results.dataset for results in run.results),
        date=f"{run.date:%Y-%m-%d %H:%M}",
        written=f"{datetime.datetime.now():%Y-%m-%d %H:%M}",
        version=__version__,
        sections=sections,
    )
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breakable"] = _breakable
    return environment.get_template("report.html.j2")


def _breakable(text: str) -> Markup:
    """Escaped text that a narrow column may break behind the marks in names of keys and files."""
    return Markup("<wbr>").join(re.split(r"(?<=[._/:])(?=[^\W\d_])", text))


def _summary(run: Run) -> list[Block]:
    blocks: list[Block] = []
    for results in run.results:
        try:
            blocks.append(result_tiles(results, run.best))
        except Exception as error:
            blocks.append(Text(f"{results.dataset}: {explain(error, 'Summary')}"))
    if not blocks:
        raise ValueError("This folder has no evaluation, and its config no DATASETS.TEST.")
    return blocks


def _curves(run: Run) -> list[Block]:
    if "history" in run.problems:
        raise ValueError(run.problems["history"])
    text = (
        "Losses and counts as written (thin) and as a moving average over a twentieth of the "
        "points (thick)."
    )
    blocks: list[Block] = [Text(text), Figures(figures.training_curves(run.history))]
    if run.commands and "--eval-only" in run.commands[-1]["command"].split():
        other = (
            "The run's last command was --eval-only: the curves are of the training, the results "
            "and the config of the weights that were evaluated last."
        )
        blocks.insert(0, Text(other))
    return blocks


def _assignment(run: Run) -> list[Block]:
    if run.cfg is None:
        raise ValueError(run.problems.get("config") or run.problems["cfg"])
    dataset, records, names = load_source([*run.cfg.DATASETS.TRAIN, *run.cfg.DATASETS.TEST])
    of = dataset
    if len(records) > _MAX_ASSIGNED:
        of = f"{_MAX_ASSIGNED} images, chosen at random, of the {len(records)} of {dataset}"
        records = _choose(records, _MAX_ASSIGNED)
    assignment = assignment_table(records, run.cfg)
    summary = summarize_assignment(assignment, names)
    tables = {kind: frame.rename(columns=_ASSIGNMENT_COLUMNS) for kind, frame in summary.items()}
    text = (
        f"Which locations learn which object of {of}, at {assignment.image_scale}: "
        f"{assignment.num_locations} positive locations of {len(assignment.objects)} objects, "
        f"{assignment.ambiguous} locations inside more than one. An object without a location is "
        "never learned from."
    )
    return [
        Text(text),
        Beside(
            [
                ("Positive locations", figures.positives_per_object(assignment.objects)),
                *(table(tables[kind], f"By {kind}.") for kind in ("size", "level", "class")),
            ]
        ),
        Shots("Some images", _overlays(records, assignment, names, run)),
    ]


def _overlays(
    records: list[dict], assignment: Assignment, names: list[str], run: Run
) -> list[Shot]:
    """Some images with objects and the locations that learn them."""
    objects = assignment.objects
    lost = Counter(objects.loc[objects["positives"] == 0, "image_id"])
    trained = Counter(objects["image_id"])
    overlays = []
    for record in _choose([x for x in records if trained[x["image_id"]]], _NUM_OVERLAYS):
        image_id = record["image_id"]
        try:
            image = draw_assignment(record, run.cfg, class_names=names)
        except (OSError, ValueError) as error:
            message = " ".join(str(error).split())
            logger.warning("not drawn: %s (%s)", record["file_name"], message)
            continue
        words = f"{lost[image_id]} of {trained[image_id]} objects without a location"
        picture = jpeg(image, f"{image_id}, positive locations: {words}", _OVERLAY_SIDE)
        overlays.append(Shot(str(image_id), words, [picture]))
    return overlays


def _choose(records: list[dict], count: int) -> list[dict]:
    """A random choice, the same for the same records, in their order."""
    chosen = np.random.default_rng(0).permutation(len(records))[:count]
    return [records[i] for i in sorted(chosen)]


def _run(run: Run) -> list[Block]:
    blocks: list[Block] = []
    commands = run.commands
    if commands:
        rows = [(str(x["environment"].get("date", "–")), x["command"]) for x in commands]
        frame = pd.DataFrame(rows, columns=["date", "command"]).set_index("date")
        note = " (from log.txt)" if "from_log" in commands[-1] else ""
        blocks.append(Beside([table(frame, f"Commands{note}, the latest last.")]))
        environment = commands[-1]["environment"].items()
        versions = {k: str(v) for k, v in environment if k != "date" and v is not None}
        frame = pd.DataFrame({"value": versions}).rename_axis("of the latest")
        blocks.append(Beside([table(frame, "Versions and hardware.")]))
    else:
        nothing = "Neither commands.json nor log.txt tells the command and versions."
        blocks.append(Text(run.problems.get("commands", nothing)))
    blocks += _config(run)
    checkpoints = pd.DataFrame(describe_checkpoints(run.folder))
    if checkpoints.empty:
        blocks.append(Text("There is neither model_best.pth nor model_final.pth."))
    else:
        blocks.append(Beside([table(checkpoints.set_index("file"), "Checkpoints.")]))
    return blocks


def _config(run: Run) -> list[Block]:
    if "config" in run.problems:
        return [Text(run.problems["config"])]
    changed = pd.DataFrame(changed_settings(run.settings), columns=["key", "value", "default"])
    return [
        Beside([table(changed.set_index("key"), "Settings that differ from the defaults.")]),
        Folded("The whole config", run.config_text),
    ]
