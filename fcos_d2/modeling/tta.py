"""`FCOSWithTTA`: test-time augmentation with resized and flipped views."""

import logging
from collections.abc import Callable, Sequence
from itertools import groupby

import torch
from detectron2.config import CfgNode
from detectron2.data.transforms import Transform
from detectron2.modeling import DatasetMapperTTA
from detectron2.modeling.meta_arch import GeneralizedRCNN
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from .decoder import nms_by_class
from .meta_arch import FCOS, output_size
from .proposal_generator import FCOSProposalGenerator

logger = logging.getLogger(__name__)


class FCOSWithTTA(nn.Module):
    """An :class:`FCOS` with test-time augmentation, called like the model itself.

    Each view of an image passes through the whole model including NMS: one forward pass per view.
    As in Detectron2's ``GeneralizedRCNNWithTTA``, boxes are mapped back to the original image,
    pooled, and suppressed class by class with the thresholds of the model's decoder.

    Views are resized from the given image, so pass the original one: ``--eval-only`` and
    ``demo.py`` set INPUT.MIN_SIZE_TEST to 0, which disables resizing in Detectron2.
    """

    def __init__(
        self,
        cfg: CfgNode,
        model: nn.Module,
        tta_mapper: Callable[[dict], list[dict]] | None = None,
    ):
        """Wrap a model; it is shared, not copied.

        Args:
            cfg: Detectron2's keys TEST.AUG.MIN_SIZES (shorter sides in pixels, 0 for the size of
                the image), MAX_SIZE (limit of the longer side) and FLIP (flip each size as well),
                and INPUT.MIN_SIZE_TEST, to warn about sizes far from it.
            model: an :class:`FCOS`, optimized for inference or not.
            tta_mapper: maps an input in Detectron2's standard format to its views, each with
                ``image`` (C, H, W) and ``transforms`` from the original image to the view.
                Detectron2's ``DatasetMapperTTA`` by default.

        Raises:
            ValueError: not an FCOS, or invalid sizes in TEST.AUG.
        """
        super().__init__()
        model = _checked(model)
        if tta_mapper is None:
            _check_views(cfg.TEST.AUG)
            tta_mapper = DatasetMapperTTA(cfg)
            _report_views(cfg)
        self.model = model
        self.tta_mapper = tta_mapper
        # Detectron2's evaluation loop restores this mode afterwards, and the model's with it.
        self.train(model.training)

    @property
    def proposal_generator(self) -> FCOSProposalGenerator:
        """Proposal generator of the model; its decoder holds the thresholds."""
        return self.model.proposal_generator

    @torch.no_grad()
    def forward(self, batched_inputs: list[dict]) -> list[dict]:
        """Detect objects.

        Args:
            batched_inputs: as in :meth:`FCOS.forward`, with images of any size.

        Returns:
            As :meth:`FCOS.forward`, best first; with equal scores, earlier views first.

        Raises:
            ValueError: the model is in training mode.
        """
        if self.model.training:
            raise ValueError("Test-time augmentation needs eval mode: call eval() first.")
        return [{"instances": self._detect(inputs)} for inputs in batched_inputs]

    def _detect(self, inputs: dict) -> Instances:
        height, width = output_size(inputs, tuple(inputs["image"].shape[1:]))
        image = _as_bytes(inputs["image"].cpu())
        views = self.tta_mapper({**inputs, "image": image, "height": height, "width": width})
        found = []
        # A view and its flipped copy form a batch. Views of different sizes would need padding,
        # which changes the output of GroupNorm.
        for _, group in groupby(views, key=lambda view: view["image"].shape):
            batch = list(group)
            outputs = self.model([{"image": view["image"]} for view in batch])
            found += [
                map_to_original(output["instances"], view["transforms"], (height, width))
                for output, view in zip(outputs, batch, strict=True)
            ]
        decoder = self.proposal_generator.decoder
        return merge_detections(found, decoder.nms_thresh, decoder.max_detections)


def map_to_original(
    instances: Instances, transforms: Transform, size: tuple[int, int]
) -> Instances:
    """Map the detections of a view to the original image.

    Args:
        instances: ``pred_boxes`` (XYXY pixels of the view), ``scores`` and ``pred_classes``.
        transforms: invertible, from the original image to the view.
        size: (height, width) of the original image.

    Returns:
        The detections with boxes in pixels of the original image, clipped to it; boxes that are
        then empty are dropped.
    """
    boxes = instances.pred_boxes.tensor
    original = Boxes(torch.as_tensor(transforms.inverse().apply_box(boxes.cpu().numpy())).to(boxes))
    original.clip(size)
    mapped = Instances(
        size,
        pred_boxes=original,
        scores=instances.scores,
        pred_classes=instances.pred_classes,
    )
    return mapped[original.nonempty()]


def merge_detections(views: Sequence[Instances], nms_thresh: float, limit: int) -> Instances:
    """Pool the detections of one image's views and apply class-wise NMS.

    Args:
        views: at least one, all with ``pred_boxes`` (XYXY pixels of the same image), ``scores``
            and ``pred_classes``.
        nms_thresh: IoU above which the lower-scored of two boxes of a class is suppressed.
        limit: maximum number of detections.

    Returns:
        The remaining detections, best first; with equal scores, earlier views first.
    """
    pool = Instances.cat(list(views))
    pool = pool[pool.scores.argsort(descending=True, stable=True)]
    keep = nms_by_class(pool.pred_boxes.tensor, pool.scores, pool.pred_classes, nms_thresh, limit)
    return pool[keep]


def _as_bytes(image: Tensor) -> Tensor:
    """Convert a float image of integer values 0 to 255 to uint8; return others unchanged.

    Detectron2's predictor passes floats, but only uint8 images are resized by Pillow, with the
    antialiasing of training.
    """
    if image.dtype == torch.uint8:
        return image
    rounded = image.clamp(0, 255).to(torch.uint8)
    return rounded if torch.equal(rounded.to(image.dtype), image) else image


def _checked(model: nn.Module) -> FCOS:
    if isinstance(model, FCOS):
        return model
    advice = "pass `.module` of a model that is wrapped for distributed training"
    if isinstance(model, GeneralizedRCNN):
        advice = (
            "set TEST.AUG.ENABLED to False and use GeneralizedRCNNWithTTA of "
            "detectron2.modeling.test_time_augmentation"
        )
    raise ValueError(
        "TEST.AUG.ENABLED: test-time augmentation supports the meta architecture FCOS, not "
        f"{type(model).__name__}; {advice}."
    )


def _check_views(aug: CfgNode) -> None:
    sizes = tuple(aug.MIN_SIZES)
    if not sizes or min(sizes) < 0:
        raise ValueError(
            f"TEST.AUG.MIN_SIZES is {sizes}: set it to the shorter sides, in pixels, of the views, "
            "0 for the size of the image."
        )
    if aug.MAX_SIZE <= 0:
        raise ValueError(
            f"TEST.AUG.MAX_SIZE is {aug.MAX_SIZE}: set it to the maximum longer side in pixels."
        )


def _report_views(cfg: CfgNode) -> None:
    aug, usual = cfg.TEST.AUG, cfg.INPUT.MIN_SIZE_TEST
    sizes = ", ".join(str(size) for size in aug.MIN_SIZES)
    logger.info(
        "Test-time augmentation, views per image: %d (shorter side %s, longer side up to %d%s)",
        len(aug.MIN_SIZES) * (2 if aug.FLIP else 1),
        sizes,
        aug.MAX_SIZE,
        ", original and flipped" if aug.FLIP else "",
    )
    # Detectron2's default sizes only suit INPUT.MIN_SIZE_TEST 800.
    if any(size and not usual / 2 <= size <= 2 * usual for size in aug.MIN_SIZES if usual):
        logger.warning(
            "TEST.AUG.MIN_SIZES has sizes below half or above twice INPUT.MIN_SIZE_TEST %d. "
            "Objects in these views can have sizes that the model was not trained on, and results "
            "can get worse: use sizes near those of training.",
            usual,
        )
