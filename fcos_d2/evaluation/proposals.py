"""Detectron2's recall of region proposals, for the data sets of this package."""

import os
from collections.abc import Sequence

from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator

from ..files import write_json
from .coco_evaluation import records_to_coco

TRUTH_FILE = "ground_truth.json"


class ProposalEvaluator(COCOEvaluator):
    """Average recall of proposals: AR@100, AR@1000 and both per object size.

    ``COCOEvaluator`` needs a COCO file with numeric image ids. If the data set has none, one is
    written, with numbered images and VOC's difficult objects as crowds, which are ignored.

    Args:
        dataset_name: registered name of the data set.
        records: its Detectron2 dataset dicts.
        output_dir: folder for ``box_proposals.pkl`` (the proposals) and, without ``json_file``,
            ``ground_truth.json``.
        json_file: COCO annotation file of the data set, if it has one.
    """

    def __init__(
        self,
        dataset_name: str,
        records: Sequence[dict],
        output_dir: str | os.PathLike,
        json_file: str | None = None,
    ) -> None:
        self._coco_ids = {record["image_id"]: record["image_id"] for record in records}
        if json_file is None:
            dataset, self._coco_ids = records_to_coco(records)
            for item in dataset["annotations"]:
                item["iscrowd"] = int(item["iscrowd"] or item["difficult"])
            # COCOEvaluator finds the file through the name of a data set. The path is a unique
            # name, since each output folder can have such a file.
            dataset_name = json_file = os.path.abspath(os.path.join(output_dir, TRUTH_FILE))
            write_json(json_file, dataset)
            MetadataCatalog.get(dataset_name).json_file = json_file
        super().__init__(dataset_name, output_dir=str(output_dir), use_fast_impl=False)

    def process(self, inputs: Sequence[dict], outputs: Sequence[dict]) -> None:
        """Keep ``proposals``: ``proposal_boxes`` (XYXY, original image) and their logits."""
        super().process([{"image_id": self._coco_ids[x["image_id"]]} for x in inputs], outputs)
