"""COCO's table of average precision and recall, computed by pycocotools."""

import contextlib
import io
import json
from collections.abc import Sequence

import numpy as np
from detectron2.utils.file_io import PathManager
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ..data.boxes import box_xywh
from .records import check_predictions

# (key, IoU, area, detections an image) in the order of COCOeval.stats.
COCO_ROWS = (
    ("AP", "0.50:0.95", "all", 100),
    ("AP50", "0.50", "all", 100),
    ("AP75", "0.75", "all", 100),
    ("APs", "0.50:0.95", "small", 100),
    ("APm", "0.50:0.95", "medium", 100),
    ("APl", "0.50:0.95", "large", 100),
    ("AR1", "0.50:0.95", "all", 1),
    ("AR10", "0.50:0.95", "all", 10),
    ("AR100", "0.50:0.95", "all", 100),
    ("ARs", "0.50:0.95", "small", 100),
    ("ARm", "0.50:0.95", "medium", 100),
    ("ARl", "0.50:0.95", "large", 100),
)


class _EvalWithDifficult(COCOeval):
    """COCOeval that ignores difficult objects too, by ordinary IoU and once each.

    ``COCOeval._prepare`` overwrites ``ignore`` with ``iscrowd``, and a crowd takes any number of
    detections and measures overlap by the detection's area alone; difficult is neither.
    """

    def _prepare(self) -> None:
        super()._prepare()
        for objects in self._gts.values():
            for item in objects:
                item["ignore"] = int(item["iscrowd"] or item.get("difficult", 0))


def coco_table(
    records: Sequence[dict],
    predictions: Sequence[dict],
    class_names: Sequence[str],
    json_file: str | None = None,
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """COCO's twelve numbers and the AP of each class, in percent.

    Args:
        records: Detectron2 dataset dicts. All of their images count: one without predictions is
            one on which nothing was found. Objects with ``difficult`` are ignored ground truth.
        predictions: dicts with ``image_id`` as in the records, ``category_id`` in [0, K), ``bbox``
            XYWH in pixels of the original image and ``score``. They are left as they are.
        class_names: names of the K classes.
        json_file: a COCO annotation file to take the ground truth from, with its own areas, in
            place of the records' boxes (whose area is width times height).

    Returns:
        The table, keyed as in :data:`COCO_ROWS`, and a list of K dicts with ``AP`` and ``AP50``.
        A number without any ground truth to measure it on is nan.

    Raises:
        ValueError: a prediction for an unknown image or class, or a json file whose categories or
            images are not those of the records.
    """
    image_ids = [record["image_id"] for record in records]
    check_predictions(predictions, image_ids, class_names)
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        if json_file is None:
            truth, coco_ids = _truth_from_records(records, class_names)
        else:
            truth, coco_ids = _truth_from_json(json_file, image_ids, class_names)
        found = _index(truth.dataset, _as_annotations(predictions, coco_ids, truth))
        evaluation = _EvalWithDifficult(truth, found, "bbox")
        evaluation.params.imgIds = sorted(coco_ids.values())
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    table = {row[0]: _percent(stat) for row, stat in zip(COCO_ROWS, evaluation.stats, strict=True)}
    # precision: (IoU thresholds, recall thresholds, classes, areas, detections an image)
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    classes = [
        {"AP": _percent_mean(precision[:, :, k]), "AP50": _percent_mean(precision[0, :, k])}
        for k in range(len(class_names))
    ]
    return table, classes


def json_category_ids(json_file: str, class_names: Sequence[str]) -> list[int]:
    """The category ids of a COCO json in the order of the classes: ascending, as in Detectron2.

    Raises:
        ValueError: the categories are not ``class_names`` in that order.
    """
    return _category_ids(_read(json_file), json_file, class_names)


def _read(json_file: str) -> dict:
    with PathManager.open(str(json_file), "r") as file:
        return json.load(file)


def _category_ids(dataset: dict, json_file: str, class_names: Sequence[str]) -> list[int]:
    categories = sorted(dataset["categories"], key=lambda category: category["id"])
    names = [category["name"] for category in categories]
    if names != list(class_names):
        raise ValueError(
            f"{json_file}: its categories are {names}, but the dataset's classes are "
            f"{list(class_names)}: register the dataset with the categories of its json file"
        )
    return [category["id"] for category in categories]


def _index(dataset: dict, annotations: list[dict]) -> COCO:
    """A COCO object over the images and categories of ``dataset`` and these annotations."""
    coco = COCO()
    coco.dataset = {
        "images": dataset["images"],
        "categories": dataset["categories"],
        # COCOeval takes id 0 for "not matched", so ids are given here, from 1.
        "annotations": [dict(item, id=i) for i, item in enumerate(annotations, start=1)],
    }
    coco.createIndex()
    return coco


def _truth_from_records(
    records: Sequence[dict], class_names: Sequence[str]
) -> tuple[COCO, dict[int | str, int]]:
    """Ground truth of the records, and {record's image id: COCO's}, which has to be a number."""
    coco_ids = {record["image_id"]: i for i, record in enumerate(records, start=1)}
    dataset = {
        "images": [{"id": i} for i in coco_ids.values()],
        "categories": [{"id": k, "name": name} for k, name in enumerate(class_names)],
    }
    annotations = []
    for record in records:
        for item in record.get("annotations", ()):
            box = box_xywh(item)
            annotations.append(
                {
                    "image_id": coco_ids[record["image_id"]],
                    "category_id": item["category_id"],
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": int(item.get("iscrowd", 0)),
                    "difficult": int(item.get("difficult", 0)),
                }
            )
    return _index(dataset, annotations), coco_ids


def _truth_from_json(
    json_file: str, image_ids: Sequence[int], class_names: Sequence[str]
) -> tuple[COCO, dict[int, int]]:
    """Ground truth of the json; ``iscrowd`` and ``area`` are filled in where a json lacks them."""
    dataset = _read(json_file)
    _category_ids(dataset, json_file, class_names)
    unknown = set(image_ids) - {image["id"] for image in dataset["images"]}
    if unknown:
        raise ValueError(
            f"{json_file}: {len(unknown)} of the dataset's images are not in it, for example "
            f"image {min(unknown, key=str)!r}"
        )
    defaults = [
        {"iscrowd": 0, "area": item["bbox"][2] * item["bbox"][3], **item}
        for item in dataset["annotations"]
    ]
    return _index(dataset, defaults), {image_id: image_id for image_id in image_ids}


def _as_annotations(
    predictions: Sequence[dict], coco_ids: dict[int | str, int], truth: COCO
) -> list[dict]:
    """The predictions with COCO's image and category ids, as COCO.loadRes would prepare them."""
    category_ids = sorted(truth.getCatIds())
    return [
        {
            "image_id": coco_ids[item["image_id"]],
            "category_id": category_ids[item["category_id"]],
            "bbox": item["bbox"],
            "area": item["bbox"][2] * item["bbox"][3],
            "score": item["score"],
            "iscrowd": 0,
        }
        for item in predictions
    ]


def _percent(value: float) -> float:
    """COCOeval marks what can't be measured by -1."""
    return float(value) * 100 if value > -1 else float("nan")


def _percent_mean(precision: np.ndarray) -> float:
    measured = precision[precision > -1]
    return float(measured.mean()) * 100 if measured.size else float("nan")
