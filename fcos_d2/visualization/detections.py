"""Detections drawn beside the ground truth."""

import colorsys
import logging
import os
from collections import defaultdict
from collections.abc import Sequence
from contextlib import AbstractContextManager

import matplotlib
import numpy as np
from detectron2.data.detection_utils import read_image
from detectron2.utils.visualizer import Visualizer
from matplotlib.figure import Figure
from PIL import Image

from ..data.boxes import box_xywh
from ..evaluation.records import is_ignored
from ..files import atomic_path

logger = logging.getLogger(__name__)

_ROW_HEIGHT = 320  # pixels of an image in the grid
_MAX_WIDTH = 560  # wider images are scaled down further
_GAP = 14
_TITLE = 26
_HEADER = 46
_MIN_PANEL = 200  # width of the title above an image
_MAX_ROW = 1900  # unless one pair is wider
_MIN_WIDTH = 640  # width of the header
_FONT_SIZE = 8  # of labels, points
_LABEL_HEIGHT = 14  # pixels
_DPI = 100

Panel = tuple[str, np.ndarray]  # title and RGB picture (H, W, 3) uint8


def draw_detection_grid(
    records: Sequence[dict],
    predictions: Sequence[dict],
    class_names: Sequence[str],
    output_png: str | os.PathLike,
    *,
    max_images: int = 8,
    score_threshold: float = 0.5,
    seed: int = 0,
) -> None:
    """Draw predictions beside ground truth for some images, with Detectron2's ``Visualizer``.

    The images are a random choice, reproducible by the seed, among those with objects (among all
    if none has objects), in the order of the records. Each class has one colour. Ignored objects
    (difficult, crowd) are dashed and labelled. Unreadable images are replaced with a warning.

    Args:
        records, predictions, class_names: see :func:`fcos_d2.evaluation.coco_table`.
        output_png: the picture, written atomically.
        max_images: maximum number of images.
        score_threshold: predictions with a lower score are not drawn.
        seed: of the choice of images.

    Raises:
        ValueError: no image can be read, or a class id is outside [0, K).
    """
    for category in {item["category_id"] for item in predictions}:
        if not 0 <= category < len(class_names):
            raise ValueError(
                f"a prediction has class id {category}, but there are {len(class_names)} classes"
            )
    by_image = group_predictions(predictions, score_threshold)
    pairs = []
    for record, image in _choose(records, max_images, seed):
        found = by_image[record["image_id"]]
        predicted = draw_predictions(image, record, found, class_names)
        truth = draw_ground_truth(image, record, class_names)
        title = f"{_shorten(record['image_id'])}: prediction ({len(found)})"
        count = len(record.get("annotations", ()))
        pairs.append(((title, predicted), (f"ground truth ({count})", truth)))
    if not pairs:
        raise ValueError("none of the images of the data set could be read")
    header = f"Predictions (score ≥ {score_threshold:g}) beside ground truth (dashed: ignored)"
    with atomic_path(output_png) as temporary:
        _compose(pairs, header).savefig(temporary, format="png")


def group_predictions(
    predictions: Sequence[dict], score_threshold: float
) -> dict[int | str, list[dict]]:
    """Return the predictions with at least this score per image id; a default dict."""
    by_image = defaultdict(list)
    for item in predictions:
        if item["score"] >= score_threshold:
            by_image[item["image_id"]].append(item)
    return by_image


def class_color(category: int) -> tuple[float, float, float]:
    """Return a bright RGB colour in [0, 1]; hues in golden ratio steps stay distinct."""
    return colorsys.hsv_to_rgb((0.33 + category * 0.618034) % 1.0, (0.95, 0.65)[category % 2], 1.0)


def draw_predictions(
    image: np.ndarray, record: dict, predictions: Sequence[dict], class_names: Sequence[str]
) -> np.ndarray:
    """Draw predictions with class and score.

    Args:
        image: (H, W, 3) RGB uint8, the record's image at any scale.
        record: has the ``height`` and ``width`` that boxes refer to.
        predictions: dicts with ``category_id``, ``bbox`` XYWH and ``score``.
        class_names: names of the K classes.

    Returns:
        (H, W, 3) RGB uint8.
    """
    predictions = sorted(predictions, key=lambda item: item["score"])  # the best ones on top
    boxes = _scale_boxes([item["bbox"] for item in predictions], record, image)
    labels = [f"{class_names[p['category_id']]} {100 * p['score']:.0f}%" for p in predictions]
    return _draw(image, boxes, labels, [item["category_id"] for item in predictions])


def draw_ground_truth(image: np.ndarray, record: dict, class_names: Sequence[str]) -> np.ndarray:
    """Draw the objects of a record; ignored ones are dashed and labelled.

    Arguments and result are as in :func:`draw_predictions`.
    """
    objects = record.get("annotations", ())
    # Large ones first, so that small ones stay visible.
    objects = sorted(objects, key=lambda item: -np.prod(box_xywh(item)[2:]))
    boxes = _scale_boxes([box_xywh(item) for item in objects], record, image)
    labels = []
    for item in objects:
        mark = " (crowd)" if item.get("iscrowd", 0) else " (difficult)"
        labels.append(class_names[item["category_id"]] + (mark if is_ignored(item) else ""))
    dashed = [i for i, item in enumerate(objects) if is_ignored(item)]
    return _draw(image, boxes, labels, [item["category_id"] for item in objects], dashed)


def plain_text() -> AbstractContextManager:
    """Draw text literally in this context; matplotlib reads text between $ as mathematics."""
    return matplotlib.rc_context({"text.parse_math": False})


def _draw(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: Sequence[str],
    categories: Sequence[int],
    dashed: Sequence[int] = (),
) -> np.ndarray:
    """Draw boxes (N, 4) XYXY with their labels, later ones on top.

    ``Visualizer.overlay_instances`` has no dashed boxes, so its primitives are used.
    """
    visualizer = Visualizer(image)
    height, width = visualizer.output.height, visualizer.output.width
    for i, (x0, y0, x1, y1) in enumerate(boxes):
        color = class_color(categories[i])
        style = "--" if i in dashed else "-"
        visualizer.draw_box(boxes[i], alpha=0.9, edge_color=color, line_style=style)
        # Outside of a small object; right-aligned near the right border.
        small = y1 - y0 < 4 * _LABEL_HEIGHT
        below = y1 + _LABEL_HEIGHT < height
        top = (y1 if below else y0 - _LABEL_HEIGHT) if small else y0
        side = "right" if x0 > 0.7 * width else "left"
        with plain_text():
            visualizer.draw_text(
                labels[i],
                (x1 if side == "right" else x0, max(top, 0)),
                color=[(1 + part) / 2 for part in color],  # lighter, on black
                font_size=_FONT_SIZE,
                horizontal_alignment=side,
            )
    return visualizer.get_output().get_image()


def _choose(records: Sequence[dict], max_images: int, seed: int) -> list[tuple[dict, np.ndarray]]:
    """Records of the grid with their images, scaled to fit a row."""
    candidates = [i for i, record in enumerate(records) if record.get("annotations")]
    candidates = candidates or list(range(len(records)))
    chosen: dict[int, np.ndarray] = {}
    for i in np.random.default_rng(seed).permutation(candidates):
        if len(chosen) == max_images:
            break
        try:
            chosen[int(i)] = read_scaled(records[i], _MAX_WIDTH, _ROW_HEIGHT)
        except OSError as error:
            logger.warning("not drawn: %s (%s)", records[i]["file_name"], error)
    return [(records[i], chosen[i]) for i in sorted(chosen)]


def read_scaled(
    record: dict, max_width: int, max_height: int, max_scale: float = float("inf")
) -> np.ndarray:
    """Read a record's image, scaled to fit a size: (H, W, 3) RGB uint8."""
    image = read_image(record["file_name"], format="RGB")
    height, width = image.shape[:2]
    scale = min(max_height / height, max_width / width, max_scale)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))


def _scale_boxes(boxes: Sequence[Sequence[float]], record: dict, image: np.ndarray) -> np.ndarray:
    """(N, 4) XYXY in pixels of ``image`` from XYWH in pixels of the record's image."""
    xyxy = np.array(boxes, dtype=float).reshape(-1, 4)
    xyxy[:, 2:] += xyxy[:, :2]
    height, width = image.shape[:2]
    return xyxy * (np.array([width, height] * 2) / ([record["width"], record["height"]] * 2))


def _compose(pairs: Sequence[tuple[Panel, Panel]], header: str) -> Figure:
    """Arrange the pairs in rows of equal height on a white figure, without resampling."""
    positions, x, row, right = [], _GAP, 0, 0
    for pair in pairs:
        pair_width = sum(_panel_width(picture) for _, picture in pair) + _GAP
        if x > _GAP and x + pair_width > _MAX_ROW:
            x, row = _GAP, row + 1
        positions.append((x, row, pair))
        right = max(right, x + pair_width)
        x += pair_width + 3 * _GAP
    row_height = _TITLE + _ROW_HEIGHT + _GAP
    width, height = max(right + _GAP, _MIN_WIDTH), _HEADER + (row + 1) * row_height
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, facecolor="white")
    figure.text(
        _GAP / width, 1 - _HEADER / 2 / height, header, va="center", fontsize=11, weight="bold"
    )
    for x, row, pair in positions:
        top = height - _HEADER - row * row_height - _TITLE
        for title, picture in pair:
            figure.figimage(picture, x, top - picture.shape[0])
            figure.text(x / width, (top + 7) / height, title, fontsize=9)
            x += _panel_width(picture) + _GAP
    return figure


def _panel_width(picture: np.ndarray) -> int:
    return max(picture.shape[1], _MIN_PANEL)


def _shorten(image_id: int | str) -> str:
    """The end of a long id, to fit above a narrow image."""
    text = str(image_id)
    return text if len(text) <= 15 else "…" + text[-14:]
