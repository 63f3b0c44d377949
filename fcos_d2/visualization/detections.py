"""A grid of images: what was predicted beside what is there."""

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
_MAX_WIDTH = 560  # a panorama becomes less high instead of wider
_GAP = 14
_TITLE = 26
_HEADER = 46
_MIN_PICTURE = 200  # the title over a picture has to fit
_MAX_ROW = 1900  # unless one pair is wider
_MIN_WIDTH = 640  # the header has to fit
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

    The images are a random choice, the same for one seed, of those that have objects (of all, if
    none has), in the order of the records. A class has one colour everywhere. Ignored objects
    (difficult, crowd) have dashed boxes and say so. An image that can't be read is named in a
    warning, and another takes its place.

    Args:
        records: Detectron2 dataset dicts.
        predictions: dicts with ``image_id`` as in the records, ``category_id`` in [0, K), ``bbox``
            XYWH in pixels of the original image and ``score``.
        class_names: names of the K classes.
        output_png: the picture, written atomically.
        max_images: how many images at most.
        score_threshold: predictions below this score are not drawn.
        seed: of the choice of images.

    Raises:
        ValueError: there is no image that can be read, or a class id outside [0, K).
    """
    for category in {item["category_id"] for item in predictions}:
        if not 0 <= category < len(class_names):
            raise ValueError(
                f"a prediction has class id {category}, but there are {len(class_names)} classes"
            )
    by_image = defaultdict(list)
    for item in predictions:
        if item["score"] >= score_threshold:
            by_image[item["image_id"]].append(item)
    pairs = []
    for record, image in _choose(records, max_images, seed):
        found = by_image[record["image_id"]]
        predicted = draw_predictions(image, record, found, class_names)
        truth = draw_ground_truth(image, record, class_names)
        objects = len(record.get("annotations", ()))
        pairs.append(
            (
                (f"{_short(record['image_id'])}: prediction ({len(found)})", predicted),
                (f"ground truth ({objects})", truth),
            )
        )
    if not pairs:
        raise ValueError("no picture of detections: none of the dataset's images could be read")
    header = f"Predictions (score ≥ {score_threshold:g}) beside ground truth (dashed: ignored)"
    with atomic_path(output_png) as temporary:
        _compose(pairs, header).savefig(temporary, format="png")


def class_color(category: int) -> tuple[float, float, float]:
    """A bright RGB colour in [0, 1] for a class; steps of the golden ratio keep hues apart."""
    return colorsys.hsv_to_rgb((0.33 + category * 0.618034) % 1.0, (0.95, 0.65)[category % 2], 1.0)


def draw_predictions(
    image: np.ndarray, record: dict, predictions: Sequence[dict], class_names: Sequence[str]
) -> np.ndarray:
    """The image with predictions, their class and score.

    Args:
        image: (H, W, 3) RGB uint8, of any scale of the record's image.
        record: gives ``height`` and ``width`` of the boxes' pixels.
        predictions: dicts with ``category_id``, ``bbox`` XYWH and ``score``.
        class_names: names of the K classes.

    Returns:
        (H, W, 3) RGB uint8.
    """
    predictions = sorted(predictions, key=lambda item: item["score"])  # the best end on top
    boxes = _scaled_boxes([item["bbox"] for item in predictions], record, image)
    labels = [f"{class_names[p['category_id']]} {100 * p['score']:.0f}%" for p in predictions]
    return _draw(image, boxes, labels, [item["category_id"] for item in predictions])


def draw_ground_truth(image: np.ndarray, record: dict, class_names: Sequence[str]) -> np.ndarray:
    """The image with the record's objects; the ignored ones are dashed and named so.

    Args:
        image: (H, W, 3) RGB uint8, of any scale of the record's image.
        record: Detectron2 dataset dict.
        class_names: names of the K classes.

    Returns:
        (H, W, 3) RGB uint8.
    """
    objects = record.get("annotations", ())
    # Large ones first, so that small ones stay in sight.
    objects = sorted(objects, key=lambda item: -np.prod(box_xywh(item)[2:]))
    boxes = _scaled_boxes([box_xywh(item) for item in objects], record, image)
    labels = []
    for item in objects:
        mark = " (crowd)" if item.get("iscrowd", 0) else " (difficult)"
        labels.append(class_names[item["category_id"]] + (mark if is_ignored(item) else ""))
    dashed = [i for i, item in enumerate(objects) if is_ignored(item)]
    return _draw(image, boxes, labels, [item["category_id"] for item in objects], dashed)


def _draw(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: Sequence[str],
    categories: Sequence[int],
    dashed: Sequence[int] = (),
) -> np.ndarray:
    """Boxes (N, 4) XYXY with their labels, the later ones on top.

    ``Visualizer.overlay_instances`` can't draw a dashed box, so its primitives are used.
    """
    with plain_text():
        return _draw_boxes(Visualizer(image), boxes, labels, categories, dashed)


def plain_text() -> AbstractContextManager:
    """Draw text inside the block letter by letter: matplotlib takes what is between $ for maths."""
    return matplotlib.rc_context({"text.parse_math": False})


def _draw_boxes(
    visualizer: Visualizer,
    boxes: np.ndarray,
    labels: Sequence[str],
    categories: Sequence[int],
    dashed: Sequence[int],
) -> np.ndarray:
    height, width = visualizer.output.height, visualizer.output.width
    for i, (x0, y0, x1, y1) in enumerate(boxes):
        color = class_color(categories[i])
        style = "--" if i in dashed else "-"
        visualizer.draw_box(boxes[i], alpha=0.9, edge_color=color, line_style=style)
        # Beside a small object, not over it; near the right border, to its left.
        small = y1 - y0 < 4 * _LABEL_HEIGHT
        below = y1 + _LABEL_HEIGHT < height
        top = (y1 if below else y0 - _LABEL_HEIGHT) if small else y0
        side = "right" if x0 > 0.7 * width else "left"
        visualizer.draw_text(
            labels[i],
            (x1 if side == "right" else x0, max(top, 0)),
            color=[(1 + part) / 2 for part in color],  # lighter: it stands on black
            font_size=_FONT_SIZE,
            horizontal_alignment=side,
        )
    return visualizer.get_output().get_image()


def _choose(records: Sequence[dict], max_images: int, seed: int) -> list[tuple[dict, np.ndarray]]:
    """Records of the grid with their images, fitted to its row height."""
    candidates = [i for i, record in enumerate(records) if record.get("annotations")]
    candidates = candidates or list(range(len(records)))
    chosen = {}
    for i in np.random.default_rng(seed).permutation(candidates):
        if len(chosen) == max_images:
            break
        try:
            chosen[int(i)] = _fitted(read_image(records[int(i)]["file_name"], format="RGB"))
        except OSError as error:
            logger.warning("not drawn: %s (%s)", records[int(i)]["file_name"], error)
    return [(records[i], chosen[i]) for i in sorted(chosen)]


def _fitted(image: np.ndarray) -> np.ndarray:
    """The image scaled to the row height, or to the largest width if it is broad."""
    height, width = image.shape[:2]
    scale = min(_ROW_HEIGHT / height, _MAX_WIDTH / width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))


def _scaled_boxes(boxes: Sequence[Sequence[float]], record: dict, image: np.ndarray) -> np.ndarray:
    """(N, 4) XYXY in pixels of ``image`` from XYWH in pixels of the record's image."""
    boxes = np.array(boxes, dtype=float).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    height, width = image.shape[:2]
    return boxes * (np.array([width, height] * 2) / ([record["width"], record["height"]] * 2))


def _compose(pairs: Sequence[tuple[Panel, Panel]], header: str) -> Figure:
    """The pairs in rows of one height, pixel for pixel, on a white figure."""
    placed, x, row, right = [], _GAP, 0, 0
    for pair in pairs:
        if x > _GAP and x + _pair_width(pair) > _MAX_ROW:
            x, row = _GAP, row + 1
        placed.append((x, row, pair))
        right = max(right, x + _pair_width(pair))
        x += _pair_width(pair) + 3 * _GAP  # pairs stand further apart than their pictures
    row_height = _TITLE + _ROW_HEIGHT + _GAP
    width, height = max(right + _GAP, _MIN_WIDTH), _HEADER + (row + 1) * row_height
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, facecolor="white")
    figure.text(
        _GAP / width, 1 - _HEADER / 2 / height, header, va="center", fontsize=11, weight="bold"
    )
    for x, row, pair in placed:
        top = height - _HEADER - row * row_height - _TITLE
        for title, picture in pair:
            figure.figimage(picture, x, top - picture.shape[0])
            figure.text(x / width, (top + 7) / height, title, fontsize=9)
            x += _panel_width(picture) + _GAP
    return figure


def _panel_width(picture: np.ndarray) -> int:
    return max(picture.shape[1], _MIN_PICTURE)


def _pair_width(pair: tuple[Panel, Panel]) -> int:
    return sum(_panel_width(picture) for _, picture in pair) + _GAP


def _short(image_id: int | str) -> str:
    """The end of a long id, so that it fits over a narrow picture."""
    text = str(image_id)
    return text if len(text) <= 15 else "…" + text[-14:]
