"""The evaluator that Detectron2's inference loop feeds: collects, gathers, measures, writes."""

import itertools
import logging
import os
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from ..files import write_json
from .coco import coco_table, json_category_ids
from .records import check_predictions, is_ignored, predictions_of
from .results import RESULTS_FILE, TABLES_FILE
from .tables import format_class_table, format_coco_table, format_voc_table
from .voc import voc_average_precision

logger = logging.getLogger(__name__)


class ModelInfo(NamedTuple):
    """What is evaluated, for ``evaluation.json``.

    Attributes:
        weights: the file, as it was named; None for a model that is being trained.
        iteration: of the training, counted from 0 as in the names of checkpoints; None: not known.
        ema: whether the weights are averaged ones; None: not known.
        tta: with test-time augmentation.
        optimize: TEST.OPTIMIZE, with compilation ("bfloat16+compile").
    """

    weights: str | None = None
    iteration: int | None = None
    ema: bool | None = None
    tta: bool = False
    optimize: str = "none"


class DetectionEvaluator(DatasetEvaluator):
    """COCO's table and VOC's AP50 of one dataset, from one pass of predictions.

    Both are measured over all images of the records. An image that was never processed (a part of
    the dataset was run) counts as one on which nothing was found, and a warning says how many.
    An image that was processed twice is an error.

    Args:
        dataset_name: the dataset's registered name, for messages and ``evaluation.json``.
        records: its Detectron2 dataset dicts, objects with ``difficult`` or ``iscrowd`` being
            ignored ground truth.
        class_names: names of the K classes.
        output_dir: folder for ``coco_instances_results.json`` (the predictions in COCO's format,
            with the json file's own category ids if there is one) and ``evaluation.json`` (the
            tables); None writes nothing.
        json_file: the dataset's COCO annotation file, if it comes from one.
        distributed: gather the predictions of all ranks; the main process alone has results.
        model_info: the model that is evaluated, for ``evaluation.json``; None if not known.

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
        if len(self._order) != len(records):
            image_id = _repeated(record["image_id"] for record in records)
            raise ValueError(f"{dataset_name}: two of its records have the image id {image_id!r}")
        if json_file is None:
            self._category_ids = list(range(len(self._class_names)))
        else:
            self._category_ids = json_category_ids(json_file, self._class_names)
        self.reset()

    def reset(self) -> None:
        """Forget all predictions."""
        self._processed: list[tuple[int | str, list[dict]]] = []

    def process(self, inputs: Sequence[dict], outputs: Sequence[dict]) -> None:
        """Keep one batch's detections.

        Args:
            inputs: dicts with ``image_id``.
            outputs: dicts with ``instances``, whose ``pred_boxes`` (XYXY in pixels of the original
                image), ``scores`` and ``pred_classes`` are read.

        Raises:
            ValueError: an image that is not the dataset's, a class id out of range, or a box or
                score that is not finite.
        """
        for given, output in zip(inputs, outputs, strict=True):
            image_id = given["image_id"]
            if image_id not in self._order:
                raise ValueError(
                    f"image {image_id!r} is not among the {len(self._order)} images of "
                    f"{self._dataset_name}: the loader and the evaluator have different datasets"
                )
            predictions = predictions_of(output["instances"], image_id)
            check_predictions(predictions, self._order, self._class_names)
            self._processed.append((image_id, predictions))

    def evaluate(self) -> OrderedDict:
        """Gather, measure, log and write.

        Returns:
            ``bbox``: COCO's twelve numbers and ``AP-<class>``; ``voc``: ``AP50_11point``,
            ``AP50_area`` and both for each class (``AP50_area-<class>``). Percent, nan where there
            is nothing to measure. Empty on ranks other than the main one.

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
        report = self._measure(predictions, num_processed_images=len(processed))
        self._log(report)
        if self._output_dir is not None:
            self._write(predictions, report)
        return _results(report)

    def _measure(self, predictions: list[dict], num_processed_images: int) -> dict:
        """Everything that ``evaluation.json`` holds."""
        names, records = self._class_names, self._records
        coco, coco_classes = coco_table(records, predictions, names, self._json_file)
        voc, voc_classes = voc_average_precision(records, predictions, names)
        counts = self._class_counts(predictions)
        rows = [
            {"name": name, **coco_row, **voc_row, **count}
            for name, coco_row, voc_row, count in zip(
                names, coco_classes, voc_classes, counts, strict=True
            )
        ]
        return {
            "dataset": self._dataset_name,
            "model": self.model_info._asdict() if self.model_info else None,
            "class_names": names,
            "category_ids": self._category_ids,
            "num_images": len(records),
            "num_processed_images": num_processed_images,
            "num_ground_truth": sum(row["num_ground_truth"] for row in rows),
            "num_ignored": sum(row["num_ignored"] for row in rows),
            "num_predictions": len(predictions),
            "bbox": coco,
            "voc": voc,
            "per_class": rows,
        }

    def _in_order(self, processed: list[tuple[int | str, list[dict]]]) -> list[dict]:
        """All predictions in the order of the records."""
        repeated = _repeated(image_id for image_id, _ in processed)
        if repeated is not None:
            raise ValueError(
                f"image {repeated!r} of {self._dataset_name} was processed twice: its detections "
                "would count as duplicates; call reset() first, and have no image in two ranks"
            )
        missing = len(self._records) - len(processed)
        if missing:
            logger.warning(
                "%s: %d of %d images were not processed; they count as images without detections",
                self._dataset_name,
                missing,
                len(self._records),
            )
        processed = sorted(processed, key=lambda item: self._order[item[0]])
        return [prediction for _, predictions in processed for prediction in predictions]

    def _class_counts(self, predictions: list[dict]) -> list[dict[str, int]]:
        """For each class the numbers of objects to find, ignored objects and predictions."""
        objects = Counter(
            (item["category_id"], is_ignored(item))
            for record in self._records
            for item in record.get("annotations", ())
        )
        predicted = Counter(prediction["category_id"] for prediction in predictions)
        return [
            {
                "num_ground_truth": objects[k, False],
                "num_ignored": objects[k, True],
                "num_predictions": predicted[k],
            }
            for k in range(len(self._class_names))
        ]

    def _log(self, report: dict) -> None:
        logger.info(
            "%s: %d images, %d objects and %d ignored ones (difficult or crowd), %d predictions",
            *(report[key] for key in ("dataset", "num_images", "num_ground_truth", "num_ignored")),
            report["num_predictions"],
        )
        logger.info("COCO's table (difficult ignored):\n%s", format_coco_table(report["bbox"]))
        logger.info("PASCAL VOC's table:\n%s", format_voc_table(report["voc"]))
        logger.info("Each class:\n%s", format_class_table(report["per_class"]))

    def _write(self, predictions: list[dict], report: dict) -> None:
        results = [
            dict(item, category_id=self._category_ids[item["category_id"]]) for item in predictions
        ]
        write_json(os.path.join(self._output_dir, RESULTS_FILE), results)
        write_json(os.path.join(self._output_dir, TABLES_FILE), report, indent=2)
        logger.info("Predictions and tables are in %s", self._output_dir)


def _repeated(items: Iterable[int | str]) -> int | str | None:
    """The first item that comes a second time, or None."""
    seen = set()
    return next((item for item in items if item in seen or seen.add(item)), None)


def _results(report: dict) -> OrderedDict:
    """The report as the nested dict of floats that Detectron2's hooks and printers expect."""
    bbox, voc = dict(report["bbox"]), dict(report["voc"])
    for row in report["per_class"]:
        bbox[f"AP-{row['name']}"] = row["AP"]
        for key in ("AP50_11point", "AP50_area"):
            voc[f"{key}-{row['name']}"] = row[key]
    return OrderedDict(bbox=bbox, voc=voc)
