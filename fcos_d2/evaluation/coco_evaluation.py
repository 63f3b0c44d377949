"""COCO's table of average precision and recall, computed by pycocotools."""

import contextlib
import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.utils.file_io import PathManager
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ..data.boxes import box_xywh
from .records import check_predictions

# (key, IoU, area, detections per image) in the order of COCOeval.stats.
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
    """COCOeval that also ignores difficult objects, by ordinary IoU and once each.

    As crowds they would match any number of detections, by the detection's area alone.
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
    """Compute COCO's twelve numbers and the AP per class, in percent.

    Args:
        records: Detectron2 dataset dicts; images without predictions count as well.
        predictions: dicts with ``image_id`` as in the records, ``category_id`` in [0, K), ``bbox``
            XYWH in pixels of the original image and ``score``. They are not modified.
        class_names: names of the K classes.
        json_file: COCO annotation file with the ground truth and its areas, instead of the
            records (whose areas are width times height).

    Returns:
        The table, keyed as in :data:`COCO_ROWS`, and a list of K dicts with ``AP`` and ``AP50``.
        Numbers without ground truth are nan.

    Raises:
        ValueError: a prediction for an unknown image or class, or a json file whose categories or
            images are not those of the records.
    """
    image_ids = [record["image_id"] for record in records]
    check_predictions(predictions, image_ids, class_names)
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        if json_file is None:
            dataset, coco_ids = records_to_coco(records, class_names)
        else:
            dataset, coco_ids = _read(json_file, class_names), {x: x for x in image_ids}
            if unknown := coco_ids.keys() - {image["id"] for image in dataset["images"]}:
                raise ValueError(
                    f"{json_file}: {len(unknown)} images of the data set are not in it, for "
                    f"example image {min(unknown, key=str)!r}"
                )
        category_ids = [category["id"] for category in dataset["categories"]]
        # The fields of COCO.loadRes, which fails without predictions and modifies them.
        found = [
            {
                **item,
                "image_id": coco_ids[item["image_id"]],
                "category_id": category_ids[item["category_id"]],
                **{"area": item["bbox"][2] * item["bbox"][3], "iscrowd": 0},
            }
            for item in predictions
        ]
        truth, detected = _index(dataset, dataset["annotations"]), _index(dataset, found)
        evaluation = _EvalWithDifficult(truth, detected, "bbox")
        evaluation.params.imgIds = sorted(coco_ids.values())
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    table = {row[0]: _percent(stat) for row, stat in zip(COCO_ROWS, evaluation.stats, strict=True)}
    # precision: (IoU thresholds, recall thresholds, classes, areas, detections per image)
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    classes = [
        {"AP": _percent(precision[:, :, k]), "AP50": _percent(precision[0, :, k])}
        for k in range(len(class_names))
    ]
    return table, classes


def records_to_coco(
    records: Sequence[dict], class_names: Sequence[str] = ()
) -> tuple[dict[str, Any], dict[int | str, int]]:
    """Convert records to the content of a COCO file, whose category ids are the class ids.

    Returns:
        The content, whose annotations also have ``difficult``, and {image id of the record: its
        COCO id, a number from 1}.
    """
    coco_ids = {record["image_id"]: i for i, record in enumerate(records, start=1)}
    annotations: list[dict] = []
    for record in records:
        for item in record.get("annotations", ()):
            box = box_xywh(item)
            ids = {"id": len(annotations) + 1, "image_id": coco_ids[record["image_id"]]}
            flags = {key: int(item.get(key, 0)) for key in ("iscrowd", "difficult")}
            annotation = {"category_id": item["category_id"], "bbox": box, "area": box[2] * box[3]}
            annotations.append({**ids, **annotation, **flags})
    images = [{"id": i, "file_name": x.get("file_name")} for i, x in enumerate(records, start=1)]
    categories = [{"id": k, "name": name} for k, name in enumerate(class_names)]
    return {"images": images, "categories": categories, "annotations": annotations}, coco_ids


def json_category_ids(json_file: str, class_names: Sequence[str]) -> list[int]:
    """Return the category ids of a COCO file in the order of the classes: ascending.

    Raises:
        ValueError: the categories are not ``class_names`` in that order.
    """
    return [category["id"] for category in _read(json_file, class_names)["categories"]]


def _read(json_file: str, class_names: Sequence[str]) -> dict[str, Any]:
    """Read a COCO file: categories sorted, ``iscrowd`` and ``area`` added where missing."""
    with PathManager.open(str(json_file), "r") as file:
        dataset = json.load(file)
    categories = sorted(dataset["categories"], key=lambda category: category["id"])
    names = [category["name"] for category in categories]
    if names != list(class_names):
        raise ValueError(
            f"{json_file}: its categories are {names}, but the classes of the data set are "
            f"{list(class_names)}: register the data set with the categories of its json file"
        )
    annotations = [
        {"iscrowd": 0, "area": x["bbox"][2] * x["bbox"][3], **x} for x in dataset["annotations"]
    ]
    return {"images": dataset["images"], "categories": categories, "annotations": annotations}


def _index(dataset: dict, annotations: list[dict]) -> COCO:
    coco = COCO()
    # COCOeval reads id 0 as "not matched", so ids are assigned here, from 1.
    numbered = [{**item, "id": i} for i, item in enumerate(annotations, start=1)]
    coco.dataset = {**dataset, "annotations": numbered}
    coco.createIndex()
    return coco


def _percent(values: float | np.ndarray) -> float:
    """The mean in percent, without the -1 by which COCOeval marks missing ground truth."""
    values = np.atleast_1d(values)
    measured = values[values > -1]
    return float(measured.mean()) * 100 if measured.size else float("nan")
