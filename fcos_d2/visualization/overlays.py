"""Objects of an image with their training locations."""

import itertools
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from detectron2.config import CfgNode
from detectron2.utils.visualizer import Visualizer
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from ..data.images import read_image
from ..data.inspection.assignment import ImageAssignment, assign_image, training_resize
from ..data.inspection.dataset_report import DatasetReport
from ..files import atomic_path, dataset_slug
from .detections import plain_text

# Colours of the levels, finest first, of different lightness.
_COLORS = ("#ffd92f", "#ff7f0e", "#e7298a", "#3b8bff", "#1bd1a5", "#ffffff", "#8c564b")
_GREEN = "#39ff14"  # objects with locations
_RED = "#ff2020"
_GREY = "#b0b0b0"
_MIN_EDGE = 480  # pixels; pictures with a shorter edge are enlarged
_FONT_SIZE = 8  # of labels, points
_LABEL_HEIGHT = 14  # pixels
_LEGEND_ROW = 22  # pixels
_LEGEND_COLUMN = 175
_DPI = 100
_MAX_OVERLAYS = 12  # per source

logger = logging.getLogger(__name__)


def draw_assignment(
    record: dict,
    cfg: CfgNode,
    *,
    class_names: Sequence[str] | None = None,
    min_size: int | None = None,
    scale: int | None = None,
) -> np.ndarray:
    """Draw the objects of a record and their training locations, at the network's input scale.

    A location is a dot in the colour of its level, larger on coarser levels. Objects are green and
    labelled with the number of their locations; objects without one are dashed red; ignored
    objects are dashed grey, and grey are the locations that they exclude from the loss.

    Args:
        record: a Detectron2 dataset dict, whose image is read.
        cfg: a recipe.
        class_names: names of the K classes; None labels objects by their number.
        min_size: length of the shorter edge; None is the median of the recipe's.
        scale: integer factor of enlargement; None makes the shorter edge at least 480 pixels.

    Returns:
        (H * scale + legend, W * scale, 3) RGB uint8, with the legend below.

    Raises:
        OSError: the image could not be read.
    """
    assignment = assign_image(record, cfg, min_size=min_size)
    image = read_image(record, "RGB")
    image = training_resize(cfg, min_size).get_transform(image).apply_image(image)
    scale = scale or max(1, -(-_MIN_EDGE // min(image.shape[:2])))
    visualizer = Visualizer(np.repeat(np.repeat(image, scale, axis=0), scale, axis=1))
    labels = [
        class_names[x["category_id"]] if class_names else f"object {number}"
        for number, x in enumerate(record.get("annotations", ()), 1)
    ]
    with plain_text():
        _draw_boxes(visualizer, assignment, labels, scale)
    _draw_points(visualizer, assignment, scale)
    drawn = visualizer.get_output().get_image()
    return np.concatenate([drawn, _draw_legend(assignment, drawn.shape[1])])


def _draw_boxes(
    visualizer: Visualizer, assignment: ImageAssignment, labels: Sequence[str], scale: int
) -> None:
    counts = np.bincount(assignment.box_of_point, minlength=len(assignment.boxes))
    sides = assignment.boxes[:, 2:] - assignment.boxes[:, :2]
    # Large ones first, so that small ones stay visible.
    for k in np.argsort(-sides.prod(1), kind="stable"):
        color, style, note = _GREEN, "-", f": {counts[k]}"
        if assignment.ignored[k]:
            color, style, note = _GREY, "--", " (ignored)"
        elif not counts[k]:
            color, style, note = _RED, "--", ": no location"
        box = assignment.boxes[k] * scale
        visualizer.draw_box(box, alpha=0.9, edge_color=color, line_style=style)
        _draw_label(visualizer, box, labels[assignment.indices[k]] + note, color)


def _draw_label(visualizer: Visualizer, box: np.ndarray, text: str, color: str) -> None:
    """Draw a label above its box, or below it without room above, so that it hides no location."""
    x0, y0, x1, y1 = box
    top = y0 - _LABEL_HEIGHT if y0 >= _LABEL_HEIGHT else y1
    top = min(top, visualizer.output.height - _LABEL_HEIGHT)
    side = "right" if x0 > 0.7 * visualizer.output.width else "left"
    visualizer.draw_text(
        text,
        (x1 if side == "right" else x0, top),
        color=color,
        font_size=_FONT_SIZE,
        horizontal_alignment=side,
    )


def _draw_points(visualizer: Visualizer, assignment: ImageAssignment, scale: int) -> None:
    ignored = assignment.ignored[assignment.box_of_point]
    for level in range(len(assignment.strides)):
        for chosen, color in ((~ignored, _color(level)), (ignored, _GREY)):
            points = assignment.points[chosen & (assignment.levels == level)] * scale
            visualizer.output.ax.scatter(
                points[:, 0],
                points[:, 1],
                s=_diameter(level) ** 2,
                color=color,
                edgecolors="black",
                linewidths=0.8,
                zorder=9,  # under the labels
            )


def _draw_legend(assignment: ImageAssignment, width: int) -> np.ndarray:
    """A strip (H, width, 3) with the number of locations per level and of ignored ones."""
    num_levels = len(assignment.strides)
    ignored = assignment.ignored[assignment.box_of_point]
    counts = np.bincount(assignment.levels[~ignored], minlength=num_levels)
    levels = zip(assignment.level_names, assignment.strides, counts, strict=True)
    entries = [
        (f"{name} (stride {stride}): {count}", _dot(_color(level), _diameter(level)))
        for level, (name, stride, count) in enumerate(levels)
    ]
    if ignored.any():
        entries.append((f"ignored: {ignored.sum()}", _dot(_GREY, 5)))
    columns = max(1, min(len(entries), width // _LEGEND_COLUMN))
    rows = -(-len(entries) // columns)
    height = rows * _LEGEND_ROW + 10
    figure = Figure(figsize=((width + 0.01) / _DPI, (height + 0.01) / _DPI), dpi=_DPI)
    figure.legend(
        [handle for _, handle in entries],
        [text for text, _ in entries],
        loc="center",
        ncols=columns,
        frameon=False,
        fontsize=9,
        handletextpad=0.1,
        columnspacing=1.0,
    )
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def _dot(color: str, size: float) -> Line2D:
    return Line2D(
        [], [], marker="o", linestyle="", color=color, markersize=size, markeredgecolor="black"
    )


def _color(level: int) -> str:
    return _COLORS[level % len(_COLORS)]


def _diameter(level: int) -> float:
    """Points (1/72 inch)."""
    return 3.5 + 1.2 * level


def write_overlays(
    report: DatasetReport,
    cfg: CfgNode,
    folder: str | os.PathLike,
    *,
    min_size: int | None = None,
) -> list[Path]:
    """Draw the training locations of a dozen images of each training source.

    Images with the most objects without a location come first. Unreadable images are skipped
    with a warning.

    Args:
        report: of ``inspect_datasets``, with the same ``cfg`` and ``min_size``.
        cfg: the recipe.
        folder: created if missing; pictures are called <source>_<image>.png.
        min_size: as there.

    Returns:
        The paths of the pictures.
    """
    paths = []
    for source in report.sources:
        assignment = report.assignments.get(source.name)
        if assignment is None:
            continue
        uncovered = assignment.objects[assignment.objects["positives"] == 0]
        counts = uncovered["image_id"].value_counts().to_dict()
        records = sorted(
            source.records, key=lambda x: (-counts.get(x["image_id"], 0), not x["annotations"])
        )
        pictures = _draw_records(records, cfg, source.class_names, min_size)
        for record, picture in itertools.islice(pictures, _MAX_OVERLAYS):
            name = f"{dataset_slug(source.name)}_{dataset_slug(str(record['image_id']))}.png"
            with atomic_path(Path(folder) / name) as temporary:
                Image.fromarray(picture).save(temporary, format="png")
            paths.append(Path(folder) / name)
    return paths


def _draw_records(
    records: Sequence[dict], cfg: CfgNode, class_names: Sequence[str], min_size: int | None
) -> Iterator[tuple[dict, np.ndarray]]:
    """Yield each record that can be drawn with its picture."""
    for record in records:
        try:
            picture = draw_assignment(record, cfg, class_names=class_names, min_size=min_size)
        except (OSError, ValueError) as error:
            message = " ".join(str(error).split())
            logger.warning("not drawn: %s (%s)", record["file_name"], message)
        else:
            yield record, picture
