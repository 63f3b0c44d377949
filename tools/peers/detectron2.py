"""Detectron2's own FCOS, in its main branch."""

from typing import Any

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead
from detectron2.structures import ImageList
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from .base import PIXEL_MEAN, PIXEL_STD, Levels, Peer, Size, build_resnet_fpn

LEVELS = ["p3", "p4", "p5", "p6", "p7"]


class _GivenAnchors(nn.Module):
    """An anchor generator that returns anchors computed before."""

    anchors: Any = None

    def forward(self, features: Any) -> Any:
        return self.anchors


class Detectron2(Peer):
    """Detectron2's FCOS."""

    name = "detectron2"

    def __init__(self, model: FCOS, input_format: str):
        self.input_format = input_format
        super().__init__(
            model,
            model.head,
            towers=("cls_subnet", "bbox_subnet"),
            predictors=("cls_score", "bbox_pred", "ctrness"),
        )
        self.decoding = FCOS(
            backbone=model.backbone,
            head=self.bare_head,
            head_in_features=LEVELS,
            num_classes=model.num_classes,
            pixel_mean=PIXEL_MEAN,
            pixel_std=PIXEL_STD,
        )
        self.decoding.anchor_generator = _GivenAnchors()

    @classmethod
    def build(cls, num_classes: int, depth: int, like_torchvision: bool = True) -> "Detectron2":
        head = FCOSHead(
            input_shape=[ShapeSpec(channels=256)] * len(LEVELS),
            num_classes=num_classes,
            conv_dims=[256] * 4,
            norm="GN",
        )
        model = FCOS(
            backbone=build_resnet_fpn(depth, stride_in_1x1=not like_torchvision),
            head=head,
            head_in_features=LEVELS,
            num_classes=num_classes,
            pixel_mean=PIXEL_MEAN if like_torchvision else PIXEL_MEAN[::-1],
            pixel_std=PIXEL_STD if like_torchvision else [1.0, 1.0, 1.0],
        )
        return cls(model, "RGB" if like_torchvision else "BGR")

    def mean_losses(self, inputs: tuple) -> list[Tensor]:
        with EventStorage() as storage:
            losses = self.model(*inputs)
            num_pos = storage.latest()["num_pos_anchors"][0] * len(inputs[0])
        # It divides by a moving average of the positives.
        factor = self.model.loss_normalizer / max(num_pos, 1)
        return [x * factor for x in losses.values()]

    def grid(self, levels: Levels, image_size: Size) -> Any:
        return self.model.anchor_generator([x.logits for x in levels])

    def match(self, grid: Any, ground_truth: Any) -> Any:
        return self.model.label_anchors(grid, ground_truth)

    def labels(self, matches: Any, ground_truth: Any) -> Tensor:
        return torch.stack(matches[0])

    def loss(self, grid: Any, levels: Levels, matches: Any, ground_truth: Any) -> Tensor:
        sizes = (self.model.num_classes, 4, 1)
        logits, ltrb, centerness = (
            [permute_to_N_HWA_K(x, size) for x in maps]
            for maps, size in zip(self.bare_head(levels), sizes, strict=True)
        )
        labels, boxes = matches
        with EventStorage():
            losses = self.model.losses(grid, logits, labels, ltrb, boxes, centerness)
        return sum(losses.values())

    def decode(self, grid: Any, outputs: Any, image_sizes: list[Size]) -> Any:
        self.decoding.anchor_generator.anchors = grid
        images = ImageList(torch.empty(0), image_sizes)
        return self.decoding.forward_inference(images, [], outputs)


ADAPTER = Detectron2
