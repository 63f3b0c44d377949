"""The evaluator for Detectron2's inference loop: collects, gathers, measures, logs, writes."""

import itertools
import logging
import os
from collections import Counter, OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from .coco_evaluation import coco_table, json_category_ids
from .records import check_predictions, first_repeated, is_ignored, predictions_of
from .results import write_results
from .tables import class_frame, coco_frame, to_text, voc_frame
from .voc_evaluation import voc_average_precision

logger = logging.getLogger(__name__)


class ModelInfo(NamedTuple):
    """The evaluated model, for ``evaluation.json``; None where unknown."""

    weights: str | None = None  # file name as given; None for a model in training
    iteration: int | None = None  # of the training, counted from 0 as in checkpoint names
    ema: bool | None = None  # whether the weights are an exponential moving average
    tta: bool = False  # whether test-time augmentation was on
    optimize: str = "none"  # TEST.OPTIMIZE


class DetectionEvaluator(DatasetEvaluator):
    """COCO's table and VOC's AP50 of one data set, from one pass of predictions.

    Both cover all images of the records. Images that were not processed count as images without
    detections, with a warning; an image processed twice is an error.

    Args:
        dataset_name: registered name, for messages and ``evaluation.json``.
        records: Detectron2 dataset dicts; ``difficult`` or ``iscrowd`` marks ignored objects.
        class_names: names of the K classes.
        output_dir: folder for ``coco_instances_results.json`` (predictions, with the category ids
            of ``json_file``) and ``evaluation.json`` (the tables); None writes nothing.
        json_file: COCO annotation file of the data set, if it has one.
        distributed: gather the predictions of all ranks; only the main process has results.
        model_info: the evaluated model; None if unknown.

    Raises:
        ValueError: two records share an image id, or the categories of ``json_file`` are not
            ``class_names``.
    """

    def __init__(
        self,
        dataset_name: str,
        records: Sequence[dict],
        class_names: Sequence[str],
        output_dir: str | os.PathLike | None = None,
        json_file: str | None = None,
        distributed: bool = True,
        *,
        model_info: ModelInfo | None = None,
    ) -> None:
        self.model_info = model_info
        self._dataset_name = dataset_name
        self._records = records
        self._class_names = list(class_names)
        self._output_dir = output_dir
        self._json_file = json_file
        self._distributed = distributed
        # Predictions are kept in the order of the records, whatever rank or batch made them.
        self._order = {record["image_id"]: i for i, record in enumerate(records)}
        repeated = first_repeated(record["image_id"] for record in records)
        if repeated is not None:
            raise ValueError(f"{dataset_name}: two records have the image id {repeated!r}")
        self._category_ids = list(range(len(self._class_names)))
        if json_file is not None:
            self._category_ids = json_category_ids(json_file, self._class_names)
        self.reset()

    def reset(self) -> None:
        """Forget all predictions."""
        self._processed: list[tuple[int | str, list[dict]]] = []

    def process(self, inputs: Sequence[dict], outputs: Sequence[dict]) -> None:
        """Keep the detections of one batch: ``instances`` as :func:`predictions_of` reads them.

        Raises:
            ValueError: an image that is not in the data set, a class id out of range, or a box or
                score that is not finite.
        """
        for given, output in zip(inputs, outputs, strict=True):
            image_id = given["image_id"]
            if image_id not in self._order:
                raise ValueError(
                    f"image {image_id!r} is not among the {len(self._order)} images of "
                    f"{self._dataset_name}: the loader and the evaluator have different data sets"
                )
            predictions = predictions_of(output["instances"], image_id)
            check_predictions(predictions, [image_id], self._class_names)
            self._processed.append((image_id, predictions))

    def evaluate(self) -> OrderedDict:
        """Gather, measure, log and write.

        Returns:
            ``bbox``: COCO's twelve numbers and ``AP-<class>``; ``voc``: ``AP50_11point``,
            ``AP50_area`` and both per class (``AP50_area-<class>``). In percent, nan without
            ground truth. Empty on ranks other than the main one.

        Raises:
            ValueError: an image was processed twice.
        """
        processed = self._processed
        if self._distributed:
            comm.synchronize()
            processed = list(itertools.chain(*comm.gather(processed, dst=0)))
            if not comm.is_main_process():
                return OrderedDict()
        predictions = self._in_order(processed)
        tables = self._measure(predictions, len(processed))
        _log(tables)
        if self._output_dir is not None:
            write_results(self._output_dir, predictions, tables)
            logger.info("Predictions and tables are in %s", self._output_dir)
        return _flatten(tables)

    def _in_order(self, processed: list[tuple[int | str, list[dict]]]) -> list[dict]:
        repeated = first_repeated(image_id for image_id, _ in processed)
        if repeated is not None:
            raise ValueError(
                f"image {repeated!r} of {self._dataset_name} was processed twice: call reset() "
                "first, and give each image to one rank only"
            )
        if missing := len(self._records) - len(processed):
            logger.warning(
                "%s: %d of %d images were not processed; they count as images without detections",
                *(self._dataset_name, missing, len(self._records)),
            )
        processed = sorted(processed, key=lambda item: self._order[item[0]])
        return [prediction for _, predictions in processed for prediction in predictions]

    def _measure(self, predictions: list[dict], num_processed: int) -> dict[str, Any]:
        """The content of ``evaluation.json``."""
        names, records = self._class_names, self._records
        coco, coco_classes = coco_table(records, predictions, names, self._json_file)
        voc, voc_classes = voc_average_precision(records, predictions, names)
        items = (item for record in records for item in record.get("annotations", ()))
        objects = Counter((item["category_id"], is_ignored(item)) for item in items)
        predicted = Counter(prediction["category_id"] for prediction in predictions)
        rows = [
            {
                "name": name,
                **coco_classes[k],
                **voc_classes[k],
                "num_ground_truth": objects[k, False],
                "num_ignored": objects[k, True],
                "num_predictions": predicted[k],
            }
            for k, name in enumerate(names)
        ]
        return {
            "dataset": self._dataset_name,
            "model": self.model_info._asdict() if self.model_info else None,
            "class_names": names,
            "category_ids": self._category_ids,
            "num_images": len(records),
            "num_processed_images": num_processed,
            **{key: sum(row[key] for row in rows) for key in ("num_ground_truth", "num_ignored")},
            "num_predictions": len(predictions),
            **{"bbox": coco, "voc": voc, "per_class": rows},
        }


def _log(tables: dict[str, Any]) -> None:
    logger.info(
        "%s: %d images, %d objects and %d ignored ones (difficult or crowd), %d predictions",
        *(tables["dataset"], tables["num_images"], tables["num_ground_truth"]),
        *(tables["num_ignored"], tables["num_predictions"]),
    )
    logger.info("COCO metrics (difficult objects ignored):\n%s", to_text(coco_frame(tables)))
    logger.info("PASCAL VOC metrics:\n%s", to_text(voc_frame(tables)))
    logger.info("Per class:\n%s", to_text(class_frame(tables)))


def _flatten(tables: dict[str, Any]) -> OrderedDict:
    """The nested dict of floats that Detectron2's hooks and printers expect."""
    bbox, voc = dict(tables["bbox"]), dict(tables["voc"])
    for row in tables["per_class"]:
        bbox[f"AP-{row['name']}"] = row["AP"]
        for key in ("AP50_11point", "AP50_area"):
            voc[f"{key}-{row['name']}"] = row[key]
    return OrderedDict(bbox=bbox, voc=voc)
