"""Records to what the model trains on, ignored objects included."""

import copy

import numpy as np
import torch
from detectron2.config import configurable
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T

DIFFICULT_CHOICES = ("ignore", "train", "drop")
CROWD_CHOICES = ("ignore", "drop")


class DetectionDatasetMapper:
    """Read an image, augment it and its boxes, and mark the objects that training ignores.

    Detectron2's ``DatasetMapper`` drops crowd regions, which are then trained as background, and
    does not know VOC's difficult objects.
    """

    @configurable
    def __init__(
        self,
        *,
        augmentations: list,
        image_format: str = "BGR",
        difficult: str = "ignore",
        crowd: str = "ignore",
    ):
        """Fix what is done to each record.

        Args:
            augmentations: Detectron2 augmentations or transforms, applied in order.
            image_format: order of the channels.
            difficult: what becomes of objects marked difficult: "ignore", "train" or "drop".
            crowd: what becomes of crowd regions: "ignore" or "drop".

        Raises:
            ValueError: an unknown choice.
        """
        if difficult not in DIFFICULT_CHOICES:
            raise ValueError(f"INPUT.DIFFICULT is {difficult!r}, not one of {DIFFICULT_CHOICES}.")
        if crowd not in CROWD_CHOICES:
            raise ValueError(f"INPUT.CROWD is {crowd!r}, not one of {CROWD_CHOICES}.")
        self.augmentations = T.AugmentationList(augmentations)
        self.image_format = image_format
        self.difficult = difficult
        self.crowd = crowd

    @classmethod
    def from_config(cls, cfg) -> dict:
        """Map ``cfg.INPUT`` to the constructor's arguments."""
        augmentations = utils.build_augmentation(cfg, is_train=True)
        if cfg.INPUT.CROP.ENABLED:
            augmentations.insert(0, T.RandomCrop(cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE))
        return {
            "augmentations": augmentations,
            "image_format": cfg.INPUT.FORMAT,
            "difficult": cfg.INPUT.DIFFICULT,
            "crowd": cfg.INPUT.CROWD,
        }

    def __call__(self, record: dict) -> dict:
        """Map a record of a data set (Detectron2's standard format) to an input of the model.

        Returns:
            The record without its annotations, with ``image`` (C, H, W) uint8 and ``instances``:
            ``gt_boxes`` (XYXY pixels of ``image``), ``gt_classes`` and ``gt_ignore`` (bool).
        """
        record = copy.deepcopy(record)
        image = utils.read_image(record["file_name"], format=self.image_format)
        utils.check_image_size(record, image)
        aug_input = T.AugInput(image)
        transforms = self.augmentations(aug_input)
        image = aug_input.image
        annotations = [x for x in record.pop("annotations", []) if not self._is_dropped(x)]
        annotations = [
            utils.transform_instance_annotations(x, transforms, image.shape[:2])
            for x in annotations
        ]
        instances = utils.annotations_to_instances(annotations, image.shape[:2])
        instances.gt_ignore = torch.tensor(
            [self._is_ignored(x) for x in annotations], dtype=torch.bool
        )
        record["image"] = torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))
        # A crop can leave nothing of a box.
        record["instances"] = utils.filter_empty_instances(instances)
        return record

    def _is_dropped(self, annotation: dict) -> bool:
        if annotation.get("iscrowd", 0):
            return self.crowd == "drop"
        return bool(annotation.get("difficult", 0)) and self.difficult == "drop"

    def _is_ignored(self, annotation: dict) -> bool:
        if annotation.get("iscrowd", 0):
            return True
        return bool(annotation.get("difficult", 0)) and self.difficult == "ignore"
