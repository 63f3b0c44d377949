"""Photographs for the report: JPEG in ``data:`` addresses, prediction beside ground truth."""

import base64
import io
import logging
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from detectron2.data.detection_utils import read_image
from PIL import Image

from ..detections import draw_ground_truth, draw_predictions
from .figures import Picture

logger = logging.getLogger(__name__)

_SIDE = 480  # pixels of the longer side
_MAX_ENLARGED = 3  # times: a stamp stays a stamp
_QUALITY = 80


class Shot(NamedTuple):
    """Drawings of one image, of one size, that open larger on a click."""

    name: str
    words: str  # what is on them
    pictures: list[Picture]


def choose_images(ranking: pd.DataFrame, count: int = 4) -> dict[str, list]:
    """The ids of the best, the typical and the worst images, none twice.

    Of the images without a mistake the best are those with the most objects. Typical are those
    around the median. Of fewer images than three times ``count`` each kind gets a third.

    Args:
        ranking: a row an image, worst first, as ``rank_images`` gives it.
        count: how many of each kind.
    """
    count = min(count, -(-len(ranking) // 3))
    order = ranking.sort_values(["f1", "tp"], ascending=False, kind="stable")
    best = order["image_id"].tolist()[:count]
    rest = ranking.loc[~ranking["image_id"].isin(best), "image_id"].tolist()
    worst, middle = rest[:count], rest[count:]
    # The median of all images, as near as those that are left come to it.
    start = max(min(len(ranking) // 2 - count - count // 2, len(middle) - count), 0)
    return {"Best": best, "Typical": middle[start : start + count], "Worst": worst}


def draw_pairs(
    image_ids: Sequence,
    records: Sequence[dict],
    predictions: Sequence[dict],
    class_names: Sequence[str],
    ranking: pd.DataFrame,
    *,
    score_thresh: float,
) -> list[Shot]:
    """Draw ground truth and predictions of some images.

    An image that can't be read is left out, with a warning.

    Args:
        image_ids: of the records to draw.
        records: Detectron2 dataset dicts.
        predictions: dicts with ``image_id``, ``category_id``, ``bbox`` XYWH and ``score``.
        class_names: names of the K classes.
        ranking: has ``image_id``, ``tp``, ``fp`` and ``fn`` of each image.
        score_thresh: predictions below it are not drawn.
    """
    by_id = {record["image_id"]: record for record in records}
    counts = ranking.set_index("image_id")
    found = defaultdict(list)
    for item in predictions:
        if item["score"] >= score_thresh:
            found[item["image_id"]].append(item)
    pairs = []
    for image_id in image_ids:
        tp, fp, fn = (int(counts.loc[image_id, key]) for key in ("tp", "fp", "fn"))
        words = f"{tp} right, {fp} wrong, {fn} missed"
        try:
            pairs.append(_draw_pair(by_id[image_id], found[image_id], class_names, words))
        except OSError as error:
            logger.warning("not drawn: %s (%s)", by_id[image_id]["file_name"], error)
    return pairs


def _draw_pair(
    record: dict, predictions: Sequence[dict], class_names: Sequence[str], words: str
) -> Shot:
    image = _fitted(read_image(record["file_name"], format="RGB"))
    truth = draw_ground_truth(image, record, class_names)
    predicted = draw_predictions(image, record, predictions, class_names)
    name = str(record["image_id"])
    pictures = [
        jpeg(truth, f"{name}, ground truth: {_listed(record, class_names)}"),
        jpeg(predicted, f"{name}, predictions: {words}"),
    ]
    return Shot(name, words, pictures)


def jpeg(image: np.ndarray, alt: str, side: int = _SIDE) -> Picture:
    """An RGB picture (H, W, 3) uint8 as JPEG, scaled down where a side is longer than ``side``."""
    picture = Image.fromarray(image)
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=_QUALITY, optimize=True)
    source = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
    return Picture(source, alt, *picture.size)


def _fitted(image: np.ndarray) -> np.ndarray:
    """The image scaled to the longer side, before boxes and labels of a fixed size are drawn."""
    height, width = image.shape[:2]
    scale = min(_SIDE / max(height, width), _MAX_ENLARGED)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))


def _listed(record: dict, class_names: Sequence[str]) -> str:
    names = [class_names[item["category_id"]] for item in record.get("annotations", ())]
    return ", ".join(names) if names else "no objects"
