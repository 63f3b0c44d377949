"""`FCOSDecoder`: predictions at locations to detected `Instances`."""

import torch
from detectron2.config import configurable
from detectron2.structures import Boxes, Instances
from torch import Tensor
from torchvision.ops import batched_nms

from .locations import Locations


class FCOSDecoder:
    """Score, select, decode, clip and suppress (paper, section 3.1, "inference")."""

    @configurable
    def __init__(
        self,
        *,
        score_thresh: float = 0.05,
        topk_candidates: int = 1000,
        nms_thresh: float = 0.6,
        max_detections: int = 100,
    ):
        """Fix the limits.

        Args:
            score_thresh: candidates need a score, sqrt(class * centerness), above this.
            topk_candidates: best candidates kept per level before NMS.
            nms_thresh: IoU above which the lower of two boxes of one class is suppressed.
            max_detections: detections per image; ties never return more.
        """
        self.score_thresh = score_thresh
        self.topk_candidates = topk_candidates
        self.nms_thresh = nms_thresh
        self.max_detections = max_detections

    @classmethod
    def from_config(cls, cfg) -> dict:
        """Map the test keys of ``cfg`` to the constructor's arguments."""
        return {
            "score_thresh": cfg.MODEL.FCOS.SCORE_THRESH_TEST,
            "topk_candidates": cfg.MODEL.FCOS.TOPK_CANDIDATES_TEST,
            "nms_thresh": cfg.MODEL.FCOS.NMS_THRESH_TEST,
            "max_detections": cfg.TEST.DETECTIONS_PER_IMAGE,
        }

    @torch.no_grad()
    def __call__(
        self,
        locations: Locations,
        logits: Tensor,
        ltrb: Tensor,
        centerness: Tensor,
        image_sizes: list[tuple[int, int]],
    ) -> list[Instances]:
        """Decode the predictions of N images; no input is changed.

        Args:
            locations: the grid of L locations.
            logits: (N, L, K) class logits.
            ltrb: (N, L, 4) distances in strides.
            centerness: (N, L) logits.
            image_sizes: (height, width) of each image in the network's input, without padding.

        Returns:
            For each image ``pred_boxes`` (XYXY pixels of the network's input, clipped to it),
            ``scores`` and ``pred_classes``, best first; with no detection they have length 0.
        """
        scores, flat = self._select(locations, logits, centerness)  # (N, C), (N, C)
        image, column = (scores > self.score_thresh).nonzero(as_tuple=True)
        scores, flat = scores[image, column], flat[image, column]
        place = flat.div(logits.shape[2], rounding_mode="floor")
        classes = flat % logits.shape[2]
        boxes = decode_boxes(
            locations.points[place], locations.strides[place], ltrb[image, place].float()
        )
        # Under tracing Detectron2's image sizes are tensors, which as_tensor takes as well.
        sizes = torch.stack([torch.as_tensor(size) for size in image_sizes])
        limits = sizes.to(boxes).flip(1).repeat(1, 2)  # width, height, width, height
        boxes = boxes.clamp(min=0).minimum(limits[image])
        keep = ((boxes[:, 2:] - boxes[:, :2]) > 0).all(1).nonzero().squeeze(1)
        # One NMS for the whole batch: boxes of different images or classes never meet. float64,
        # since batched_nms moves the groups apart by large offsets.
        group = image[keep] * logits.shape[2] + classes[keep]
        keep = keep[
            batched_nms(boxes[keep].double(), scores[keep].double(), group, self.nms_thresh)
        ]
        results = []
        for index, size in enumerate(image_sizes):
            best = keep[image[keep] == index][: self.max_detections]
            results.append(
                Instances(
                    size,
                    pred_boxes=Boxes(boxes[best]),
                    scores=scores[best],
                    pred_classes=classes[best],
                )
            )
        return results

    def _select(
        self, locations: Locations, logits: Tensor, centerness: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Take the best candidates of each level.

        Returns:
            Scores (N, C) and flat indices (N, C) into (L * K,).
        """
        num_classes = logits.shape[2]
        scores, flat, start = [], [], 0
        for length in locations.level_lengths:
            end = start + length
            level = logits[:, start:end].float().sigmoid()
            level = (level * centerness[:, start:end, None].float().sigmoid()).sqrt().flatten(1)
            best = level.topk(min(self.topk_candidates, level.shape[1]), dim=1)
            scores.append(best.values)
            flat.append(best.indices + start * num_classes)
            start = end
        return torch.cat(scores, dim=1), torch.cat(flat, dim=1)


def decode_boxes(points: Tensor, strides: Tensor, ltrb: Tensor) -> Tensor:
    """Boxes (R, 4), XYXY pixels, of points (R, 2), strides (R,), distances in strides (R, 4)."""
    ltrb = ltrb * strides[:, None]
    return torch.cat((points - ltrb[:, :2], points + ltrb[:, 2:]), dim=1)


def encode_boxes(points: Tensor, strides: Tensor, boxes: Tensor) -> Tensor:
    """Distances l, t, r, b in strides (R, 4), the inverse of :func:`decode_boxes`."""
    return torch.cat((points - boxes[:, :2], boxes[:, 2:] - points), dim=1) / strides[:, None]
