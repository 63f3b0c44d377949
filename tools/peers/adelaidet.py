"""AdelaiDet's FCOS."""

import copy
from typing import Any

import torch
from adet.config import get_cfg
from adet.modeling.fcos import FCOS
from adet.modeling.one_stage_detector import OneStageDetector
from torch import Tensor, nn

from .base import PIXEL_MEAN, PIXEL_STD, Levels, Peer, Size, build_resnet_fpn

SCORE_THRESH = 0.2


class AdelaiDet(Peer):
    """AdelaiDet's FCOS."""

    name = "adelaidet"

    def __init__(self, model: nn.Module):
        self.generator = model.proposal_generator
        super().__init__(
            model,
            self.generator.fcos_head,
            towers=("share_tower", "cls_tower", "bbox_tower"),
            predictors=("cls_logits", "bbox_pred", "ctrness"),
        )
        # Matching has no public method of its own. For the losses alone, a copy takes matches in
        # place of the ground truth.
        self.outputs = self.generator.fcos_outputs
        self.matched_outputs = copy.deepcopy(self.outputs)
        self.matched_outputs._get_ground_truth = lambda locations, matches: matches

    @classmethod
    def build(cls, num_classes: int, depth: int, like_torchvision: bool = True) -> "AdelaiDet":
        cfg = get_cfg()
        cfg.MODEL.FCOS.NUM_CLASSES = num_classes
        cfg.MODEL.FCOS.USE_SCALE = False
        # The threshold of the others is on the root of class times centerness.
        cfg.MODEL.FCOS.THRESH_WITH_CTR = True
        cfg.MODEL.FCOS.INFERENCE_TH_TEST = SCORE_THRESH**2
        backbone = build_resnet_fpn(depth, stride_in_1x1=False)
        model = OneStageDetector(
            backbone=backbone,
            proposal_generator=FCOS(cfg, backbone.output_shape()),
            pixel_mean=PIXEL_MEAN,
            pixel_std=PIXEL_STD,
        )
        return cls(model)

    def grid(self, levels: Levels, image_size: Size) -> Any:
        return self.generator.compute_locations([x.logits for x in levels])

    def match(self, grid: Any, ground_truth: Any) -> Any:
        return self.outputs._get_ground_truth(grid, ground_truth)

    def labels(self, matches: Any, ground_truth: Any) -> Tensor:
        return torch.cat([x.view(len(ground_truth), -1) for x in matches["labels"]], dim=1)

    def loss(self, grid: Any, levels: Levels, matches: Any, ground_truth: Any) -> Tensor:
        logits, ltrb, centerness, *_ = self.bare_head(levels)
        _, losses = self.matched_outputs.losses(logits, ltrb, centerness, grid, matches, [])
        return sum(losses.values())

    def decode(self, grid: Any, outputs: Any, image_sizes: list[Size]) -> Any:
        return self.outputs.predict_proposals(*outputs[:3], grid, image_sizes, [])


ADAPTER = AdelaiDet
