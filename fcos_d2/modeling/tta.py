"""`FCOSWithTTA`: detect in several sizes of an image and in its mirror image, and merge."""

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
    """An :class:`FCOS` with test-time augmentation, called as the model itself.

    Each view of an image goes through the whole model, its own NMS and limit included. Boxes are
    mapped back to the original image, pooled, and go through the class-wise NMS of the model's
    decoder once more; so Detectron2's ``GeneralizedRCNNWithTTA`` merges boxes. It costs as many
    inferences as there are views, each as long as its size demands, beside the resizing.

    Views are resized from the image that is given. One that was resized before has lost what a
    larger view would show, so give the original: ``--eval-only`` and ``demo.py`` do that with
    INPUT.MIN_SIZE_TEST 0, which is no resizing in Detectron2.
    """

    def __init__(
        self,
        cfg: CfgNode,
        model: nn.Module,
        tta_mapper: Callable[[dict], list[dict]] | None = None,
    ):
        """Wrap a model; it is shared, not copied.

        Args:
            cfg: of Detectron2's keys, TEST.AUG.MIN_SIZES (shorter sides in pixels, 0 for the
                image's own), MAX_SIZE (limit of the longer side) and FLIP (each size mirrored,
                too) are read, and INPUT.MIN_SIZE_TEST to warn of sizes that are far from it.
            model: an :class:`FCOS`, optimized for inference or not. The threshold and the limit of
                the merging are those of its decoder.
            tta_mapper: makes the views of an input in Detectron2's standard format, each with
                ``image`` (C, H, W) and ``transforms``, from the original image to the view.
                Detectron2's ``DatasetMapperTTA`` by default.

        Raises:
            ValueError: another model, or TEST.AUG names no view.
        """
        super().__init__()
        model = _checked(model)
        if tta_mapper is None:
            _check_views(cfg.TEST.AUG)
            tta_mapper = DatasetMapperTTA(cfg)
            _report_views(cfg)
        self.model = model
        self.tta_mapper = tta_mapper
        # Detectron2's loop puts the mode back that it found, the model's with it.
        self.train(model.training)

    @property
    def proposal_generator(self) -> FCOSProposalGenerator:
        """The model's own; its decoder holds the thresholds."""
        return self.model.proposal_generator

    @torch.no_grad()
    def forward(self, batched_inputs: list[dict]) -> list[dict]:
        """Detect objects.

        Args:
            batched_inputs: as :meth:`FCOS.forward` takes them; images of any size.

        Returns:
            For each image ``{"instances": Instances}`` at the output's size, as of the model: best
            first, of equal scores the earlier view's.

        Raises:
            ValueError: the model is in training mode.
        """
        if self.model.training:
            raise ValueError("Test-time augmentation is for inference: call eval() on it first.")
        return [{"instances": self._detect(inputs)} for inputs in batched_inputs]

    def _detect(self, inputs: dict) -> Instances:
        height, width = output_size(inputs, tuple(inputs["image"].shape[1:]))
        image = _as_bytes(inputs["image"].cpu())
        views = self.tta_mapper({**inputs, "image": image, "height": height, "width": width})
        found = []
        # A view and its mirror image are a batch; views of other sizes would have to be padded,
        # and padding changes what a model with group norm gives.
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
    """Map the detections of a view to the image that it was made from.

    Args:
        instances: ``pred_boxes`` (XYXY pixels of the view), ``scores`` and ``pred_classes``.
        transforms: from the original image to the view, with an inverse.
        size: (height, width) of the original image.

    Returns:
        The same detections with boxes in pixels of the original image, clipped to it; without
        those of which nothing is left.
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
    """Pool the detections of one image's views and suppress, class by class, what is found twice.

    Args:
        views: at least one, all with ``pred_boxes`` (XYXY pixels of the same image), ``scores``
            and ``pred_classes``.
        nms_thresh: IoU above which the lower of two boxes of one class is suppressed.
        limit: detections at most.

    Returns:
        The detections that are left, best first, of equal scores the earlier view's.
    """
    pool = Instances.cat(list(views))
    pool = pool[pool.scores.argsort(descending=True, stable=True)]
    # It separates classes in float64, so that coordinates, and IoU with them, lose no digits.
    keep = nms_by_class(pool.pred_boxes.tensor, pool.scores, pool.pred_classes, nms_thresh, limit)
    return pool[keep]


def _as_bytes(image: Tensor) -> Tensor:
    """Return a float image of whole values 0 to 255 as uint8, another one as it is.

    Only bytes are resized by Pillow, with the antialiasing of the training; Detectron2's
    predictor gives floats.
    """
    if image.dtype == torch.uint8:
        return image
    rounded = image.clamp(0, 255).to(torch.uint8)
    return rounded if torch.equal(rounded.to(image.dtype), image) else image


def _checked(model: nn.Module) -> FCOS:
    if isinstance(model, FCOS):
        return model
    advice = "a model wrapped for distributed training is its `.module`"
    if isinstance(model, GeneralizedRCNN):
        advice = (
            "Detectron2's own does it, GeneralizedRCNNWithTTA of "
            "detectron2.modeling.test_time_augmentation; set TEST.AUG.ENABLED to False here"
        )
    raise ValueError(
        f"TEST.AUG.ENABLED: test-time augmentation is for the meta architecture FCOS, not for a "
        f"{type(model).__name__}; {advice}."
    )


def _check_views(aug: CfgNode) -> None:
    sizes = tuple(aug.MIN_SIZES)
    if not sizes or min(sizes) < 0:
        raise ValueError(
            f"TEST.AUG.MIN_SIZES is {sizes}: name the shorter sides, in pixels, of the views, 0 "
            "for the image's own."
        )
    if aug.MAX_SIZE <= 0:
        raise ValueError(
            f"TEST.AUG.MAX_SIZE is {aug.MAX_SIZE}: set it to the longest side of a view in pixels."
        )


def _report_views(cfg: CfgNode) -> None:
    aug, usual = cfg.TEST.AUG, cfg.INPUT.MIN_SIZE_TEST
    sizes = ", ".join(str(size) for size in aug.MIN_SIZES)
    logger.info(
        "Test-time augmentation, views of an image: %d (shorter side %s, longer side up to %d%s)",
        len(aug.MIN_SIZES) * (2 if aug.FLIP else 1),
        sizes,
        aug.MAX_SIZE,
        ", as they are and mirrored" if aug.FLIP else "",
    )
    # Detectron2's default sizes are right for 800 pixels alone.
    if any(size and not usual / 2 <= size <= 2 * usual for size in aug.MIN_SIZES if usual):
        logger.warning(
            "TEST.AUG.MIN_SIZES has views of less than half or more than twice the usual size, "
            "INPUT.MIN_SIZE_TEST %d. Objects in them can be of sizes that the model never saw, and "
            "results worse than without: set it to sizes near those of the training.",
            usual,
        )
