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
        score: str = "sqrt",
        score_thresh: float = 0.05,
        score_thresh_on: str = "score",
        topk_candidates: int = 1000,
        topk_on: str = "score",
        nms_thresh: float = 0.6,
        max_detections: int = 100,
        clip_before_nms: bool = True,
        min_box_size: float = 0.0,
    ):
        """Fix the rules and the limits.

        Args:
            score: the score that is reported: "sqrt", the square root of class probability times
                quality, or "product", that itself; without a quality it is the class probability.
            score_thresh: candidates need more than this.
            score_thresh_on: of "score", the one that is reported, or of "cls", the class
                probability.
            topk_candidates: best candidates kept per level before NMS.
            topk_on: best by "score" or by "cls".
            nms_thresh: IoU above which the lower of two boxes of one class is suppressed.
            max_detections: detections per image; ties never return more.
            clip_before_nms: clip boxes to the image before NMS; else after the limit.
            min_box_size: width and height have to be larger, in pixels.

        Raises:
            ValueError: an unknown option.
        """
        for key, value, known in (
            ("SCORE", score, ("sqrt", "product")),
            ("SCORE_THRESH_ON", score_thresh_on, ("score", "cls")),
            ("TOPK_ON", topk_on, ("score", "cls")),
        ):
            if value not in known:
                raise ValueError(f"MODEL.FCOS.{key} is {value!r}, not one of {known}.")
        self.score = score
        self.score_thresh = score_thresh
        self.score_thresh_on = score_thresh_on
        self.topk_candidates = topk_candidates
        self.topk_on = topk_on
        self.nms_thresh = nms_thresh
        self.max_detections = max_detections
        self.clip_before_nms = clip_before_nms
        self.min_box_size = min_box_size

    @classmethod
    def from_config(cls, cfg) -> dict:
        """Map the test keys of ``cfg`` to the constructor's arguments."""
        return {
            "score": cfg.MODEL.FCOS.SCORE,
            "score_thresh": cfg.MODEL.FCOS.SCORE_THRESH_TEST,
            "score_thresh_on": cfg.MODEL.FCOS.SCORE_THRESH_ON,
            "topk_candidates": cfg.MODEL.FCOS.TOPK_CANDIDATES_TEST,
            "topk_on": cfg.MODEL.FCOS.TOPK_ON,
            "nms_thresh": cfg.MODEL.FCOS.NMS_THRESH_TEST,
            "max_detections": cfg.TEST.DETECTIONS_PER_IMAGE,
            "clip_before_nms": cfg.MODEL.FCOS.CLIP_BEFORE_NMS,
        }

    @torch.no_grad()
    def __call__(
        self,
        locations: Locations,
        logits: Tensor,
        ltrb: Tensor,
        quality: Tensor | None,
        image_sizes: list[tuple[int, int]],
    ) -> list[Instances]:
        """Decode the predictions of N images; no input is changed.

        Args:
            locations: the grid of L locations.
            logits: (N, L, K) class logits.
            ltrb: (N, L, 4) distances in strides.
            quality: (N, L) logits, or None.
            image_sizes: (height, width) of each image in the network's input, without padding.

        Returns:
            For each image ``pred_boxes`` (XYXY pixels of the network's input, clipped to it),
            ``scores`` and ``pred_classes``, best first; with no detection they have length 0.
        """
        # Under tracing Detectron2's image sizes are tensors, which as_tensor takes as well.
        sizes = torch.stack([torch.as_tensor(size) for size in image_sizes])
        limits = sizes.to(locations.points).flip(1).repeat(1, 2)  # width, height, width, height
        image, place, classes, scores = self._select(locations, logits, quality)
        boxes = decode_boxes(
            locations.points[place], locations.strides[place], ltrb[image, place].float()
        )
        clipped = boxes.clamp(min=0).minimum(limits[image])
        candidates = boxes
        keep = torch.arange(len(boxes), device=boxes.device)
        if self.clip_before_nms:
            candidates, keep = clipped, self._large(clipped).nonzero().squeeze(1)
        group = image * logits.shape[2] + classes
        keep = keep[_suppress(candidates[keep], scores[keep], group[keep], self.nms_thresh)]
        results = []
        for index, size in enumerate(image_sizes):
            best = keep[image[keep] == index][: self.max_detections]
            best = best[self._large(clipped[best])]
            results.append(
                Instances(
                    size,
                    pred_boxes=Boxes(clipped[best]),
                    scores=scores[best],
                    pred_classes=classes[best],
                )
            )
        return results

    def _large(self, boxes: Tensor) -> Tensor:
        return ((boxes[:, 2:] - boxes[:, :2]) > self.min_box_size).all(1)

    def _select(
        self, locations: Locations, logits: Tensor, quality: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Take the best candidates of each level.

        Returns:
            Image, location, class and score of each of them, all (R,).
        """
        num_classes = logits.shape[2]
        found, start = [], 0
        for length in locations.level_lengths:
            end = start + length
            cls = logits[:, start:end].float().sigmoid()  # (N, L_l, K)
            score = self._score(cls, None if quality is None else quality[:, start:end, None])
            good = (score if self.score_thresh_on == "score" else cls) > self.score_thresh
            # Below every probability where the threshold is not reached.
            rank = torch.where(good, score if self.topk_on == "score" else cls, -1.0).flatten(1)
            best, flat = rank.topk(min(self.topk_candidates, rank.shape[1]), dim=1)
            image, column = (best >= 0).nonzero(as_tuple=True)
            flat = flat[image, column]
            place = flat.div(num_classes, rounding_mode="floor")
            found.append((image, place + start, flat % num_classes, score.flatten(1)[image, flat]))
            start = end
        return tuple(torch.cat(parts) for parts in zip(*found, strict=True))

    def _score(self, cls: Tensor, quality: Tensor | None) -> Tensor:
        if quality is None:
            return cls
        product = cls * quality.float().sigmoid()
        return product.sqrt() if self.score == "sqrt" else product


def _suppress(boxes: Tensor, scores: Tensor, group: Tensor, threshold: float) -> Tensor:
    """One NMS for the whole batch: boxes of different groups, images or classes, never meet.

    ``batched_nms`` moves the groups apart by the largest coordinate, so none may be negative; and
    these offsets are large, so it is done in float64.
    """
    boxes = boxes.double()
    boxes = boxes - torch.cat((boxes.flatten(), boxes.new_zeros(1))).min()
    return batched_nms(boxes, scores.double(), group, threshold)


def decode_boxes(points: Tensor, strides: Tensor, ltrb: Tensor) -> Tensor:
    """Boxes (R, 4), XYXY pixels, of points (R, 2), strides (R,), distances in strides (R, 4)."""
    ltrb = ltrb * strides[:, None]
    return torch.cat((points - ltrb[:, :2], points + ltrb[:, 2:]), dim=1)


def encode_boxes(points: Tensor, strides: Tensor, boxes: Tensor) -> Tensor:
    """Distances l, t, r, b in strides (R, 4), the inverse of :func:`decode_boxes`."""
    return torch.cat((points - boxes[:, :2], boxes[:, 2:] - points), dim=1) / strides[:, None]
