"""Detectron2's recall of region proposals, for the data sets of this package."""

import os
from collections.abc import Sequence

from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator

from ..data.boxes import box_xywh
from ..files import write_json
from .records import is_ignored

TRUTH_FILE = "ground_truth.json"


class ProposalEvaluator(COCOEvaluator):
    """Average recall of proposals: AR@100, AR@1000 and each by size of the objects.

    ``COCOEvaluator`` measures against a COCO file, in which ids of images have to be numbers. Where
    a data set has none, one is written, with the images numbered and VOC's difficult objects as
    crowds, which count for nothing.
    """

    def __init__(
        self,
        dataset_name: str,
        records: Sequence[dict],
        output_dir: str | os.PathLike,
        json_file: str | None = None,
    ):
        """Read the ground truth.

        Args:
            dataset_name: the data set's registered name.
            records: its Detectron2 dataset dicts.
            output_dir: folder for ``box_proposals.pkl``, the proposals, and ``ground_truth.json``,
                where one is written.
            json_file: the data set's COCO file, if it comes from one.
        """
        self._coco_ids = {record["image_id"]: record["image_id"] for record in records}
        if json_file is None:
            self._coco_ids = {record["image_id"]: i for i, record in enumerate(records, start=1)}
            # COCOEvaluator knows a file by the data set that it belongs to. The name of that is the
            # file's own: there can be one in each output folder.
            dataset_name = json_file = os.path.abspath(os.path.join(output_dir, TRUTH_FILE))
            write_json(json_file, self._truth(records))
            MetadataCatalog.get(dataset_name).json_file = json_file
        super().__init__(dataset_name, output_dir=str(output_dir), use_fast_impl=False)

    def process(self, inputs: Sequence[dict], outputs: Sequence[dict]) -> None:
        """Keep one batch's proposals.

        Args:
            inputs: dicts with ``image_id``.
            outputs: dicts with ``proposals``, whose ``proposal_boxes`` (XYXY in pixels of the
                original image) and ``objectness_logits`` are read.
        """
        super().process([{"image_id": self._coco_ids[x["image_id"]]} for x in inputs], outputs)

    def _truth(self, records: Sequence[dict]) -> dict:
        boxes = [
            (self._coco_ids[record["image_id"]], item, box_xywh(item))
            for record in records
            for item in record.get("annotations", ())
        ]
        return {
            "images": [
                {"id": self._coco_ids[record["image_id"]], "file_name": record["file_name"]}
                for record in records
            ],
            "categories": [],
            "annotations": [
                {
                    "id": number,
                    "image_id": image_id,
                    "category_id": item["category_id"],
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": int(is_ignored(item)),
                }
                for number, (image_id, item, box) in enumerate(boxes, start=1)
            ],
        }
