"""Mapper of dataset records to model inputs."""

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.structures import Instances

from .images import read_image, reduction

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
        reduced_jpeg: bool = False,
        is_train: bool = True,
    ):
        """
        Args:
            augmentations: Detectron2 augmentations or transforms, applied in order.
            image_format: order of the channels.
            difficult: role of objects marked difficult: "ignore", "train" or "drop".
            crowd: role of crowd regions: "ignore" or "drop".
            reduced_jpeg: decode JPEG files at 1/2, 1/4 or 1/8 of their size if the first
                augmentation is a ``ResizeShortestEdge`` that shrinks them at least that much.
                Sizes and boxes stay the same.
            is_train: add the objects; otherwise only the image is mapped.

        Raises:
            ValueError: an unknown role.
        """
        if difficult not in DIFFICULT_CHOICES:
            raise ValueError(f"INPUT.DIFFICULT is {difficult!r}, not one of {DIFFICULT_CHOICES}.")
        if crowd not in CROWD_CHOICES:
            raise ValueError(f"INPUT.CROWD is {crowd!r}, not one of {CROWD_CHOICES}.")
        self.augmentations = list(augmentations)
        self.image_format = image_format
        self.difficult = difficult
        self.crowd = crowd
        self.reduced_jpeg = reduced_jpeg
        self.is_train = is_train

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict:
        """Map ``cfg.INPUT`` to the constructor's arguments."""
        augmentations = utils.build_augmentation(cfg, is_train)
        if is_train and cfg.INPUT.CROP.ENABLED:
            augmentations.insert(0, T.RandomCrop(cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE))
        if is_train:
            augmentations += color_jitter(cfg.INPUT.COLOR_JITTER)
        return {
            "augmentations": augmentations,
            "image_format": cfg.INPUT.FORMAT,
            "difficult": cfg.INPUT.DIFFICULT,
            "crowd": cfg.INPUT.CROWD,
            "reduced_jpeg": is_train and cfg.INPUT.REDUCED_JPEG_TRAIN,
            "is_train": is_train,
        }

    def __call__(self, record: dict) -> dict:
        """Map a record (Detectron2's standard format) to an input of the model.

        Returns:
            The record without annotations, with ``image`` (C, H, W) uint8 and in training
            ``instances``: ``gt_boxes`` (XYXY pixels of ``image``), ``gt_classes``, ``gt_ignore``.
        """
        record = dict(record)
        annotations = record.pop("annotations", [])
        image, transforms = self._read(record)
        record["image"] = torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))
        if self.is_train:
            record["instances"] = self._instances(annotations, transforms, image.shape[:2])
        return record

    def _read(self, record: dict) -> tuple[np.ndarray, T.TransformList]:
        """Read and augment the image; the transforms are those of its full size."""
        factor, resize = 1, None
        first = self.augmentations[0] if self.augmentations else None
        if self.reduced_jpeg and isinstance(first, T.ResizeShortestEdge):
            # Only the shape of the array is used.
            shape = (record["height"], record["width"], 3)
            resize = first.get_transform(np.broadcast_to(np.uint8(0), shape))
            factor = reduction(resize)
        image = read_image(record, self.image_format, factor)
        augmentations, transforms = self.augmentations, T.TransformList([])
        if resize is not None:
            augmentations, transforms = augmentations[1:], T.TransformList([resize])
            image = _resize(image, resize)
        aug_input = T.AugInput(image)
        transforms = transforms + T.AugmentationList(augmentations)(aug_input)
        return aug_input.image, transforms

    def _instances(
        self, annotations: list[dict], transforms: T.TransformList, size: tuple[int, int]
    ) -> Instances:
        boxes, ignored = [], []
        for annotation in annotations:
            role = training_role(annotation, self.difficult, self.crowd)
            if role == "drop":
                continue
            ignored.append(role == "ignore")
            # Only the box: polygons need no transform. As floats, since integers would stay
            # integers when they are resized.
            box = {k: annotation[k] for k in ("bbox_mode", "category_id")}
            box["bbox"] = [float(v) for v in annotation["bbox"]]
            boxes.append(utils.transform_instance_annotations(box, transforms, size))
        instances = utils.annotations_to_instances(boxes, size)
        instances.gt_ignore = torch.tensor(ignored, dtype=torch.bool)
        # A crop can leave nothing of a box.
        return utils.filter_empty_instances(instances)


def training_role(annotation: dict, difficult: str, crowd: str) -> str:
    """Return what training does with an object: "train", "ignore" or "drop" it.

    Args:
        annotation: of a record.
        difficult: INPUT.DIFFICULT, for objects marked difficult.
        crowd: INPUT.CROWD, for crowd regions.
    """
    if annotation.get("iscrowd", 0):
        return crowd
    return difficult if annotation.get("difficult", 0) else "train"


def color_jitter(strength: float) -> list[T.Augmentation]:
    """Return random brightness, contrast and saturation, or nothing if ``strength`` is 0.

    Args:
        strength: factors are drawn from [1 - strength, 1 + strength].

    Raises:
        ValueError: it is not in [0, 1).
    """
    if not 0 <= strength < 1:
        raise ValueError(f"INPUT.COLOR_JITTER is {strength}: it must be in [0, 1), such as 0.2.")
    if not strength:
        return []
    factors = (1 - strength, 1 + strength)
    # Detectron2 weights the channels of the gray image as RGB; with BGR, saturation changes
    # around a slightly different gray.
    return [T.RandomBrightness(*factors), T.RandomContrast(*factors), T.RandomSaturation(*factors)]


def _resize(image: np.ndarray, resize: T.Transform) -> np.ndarray:
    """Resize an image, decoded at any size, to the output size of ``resize``."""
    if isinstance(resize, T.ResizeTransform):
        size = resize.new_h, resize.new_w, resize.interp
        resize = T.ResizeTransform(*image.shape[:2], *size)
    return resize.apply_image(image)
