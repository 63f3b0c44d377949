"""`FCOSDecoder`: head outputs to detected `Instances`."""

from dataclasses import dataclass

import torch
from detectron2.config import CfgNode, configurable
from detectron2.structures import Boxes, Instances
from torch import Tensor
from torchvision.ops import nms

from ..config import check_option
from .locations import Locations


class FCOSDecoder:
    """Score, select, decode, clip and suppress (paper, section 3.1, "inference").

    Each step but NMS processes all images and levels of the batch at once.
    """

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
        """Set the rules and the limits.

        Args:
            score: reported score: "product" of class probability and quality, or "sqrt", its
                square root. Without a quality both are the class probability.
            score_thresh: candidates must be above this.
            score_thresh_on: "score" compares the reported score, "cls" the class probability.
            topk_candidates: maximum number of candidates per level before NMS.
            topk_on: "score" or "cls", by which these are chosen.
            nms_thresh: IoU above which the lower-scored of two boxes of a class is suppressed.
            max_detections: maximum number of detections per image, also with equal scores.
            clip_before_nms: clip boxes to the image before NMS instead of after it.
            min_box_size: width and height, in pixels, must be larger.

        Raises:
            ValueError: an unknown option.
        """
        check_option("MODEL.FCOS.SCORE", score, ("sqrt", "product"))
        check_option("MODEL.FCOS.SCORE_THRESH_ON", score_thresh_on, ("score", "cls"))
        check_option("MODEL.FCOS.TOPK_ON", topk_on, ("score", "cls"))
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
    def from_config(cls, cfg: CfgNode) -> dict:
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
        """Decode the predictions of N images; the inputs are not modified.

        Args:
            locations: the grid of L locations.
            logits: (N, L, K) class logits.
            ltrb: (N, L, 4) distances in strides.
            quality: (N, L) logits, or None.
            image_sizes: (height, width) of each image in the network's input, without padding.

        Returns:
            For each image ``pred_boxes`` (XYXY pixels of the network's input, clipped to it),
            ``scores`` and ``pred_classes``, best first; of length 0 if nothing is detected.
        """
        found = self._best_per_level(self._candidates(logits, quality), locations)
        points, strides = _rows(found.location, locations.points, locations.strides)
        boxes = decode_boxes(points, strides, ltrb[found.image, found.location].float())
        limits = boxes.new_tensor([(w, h, w, h) for h, w in image_sizes])
        clipped = boxes.clamp(min=0).minimum(limits.index_select(0, found.image))
        keep = self._large(clipped) if self.clip_before_nms else boxes.isfinite().all(1)
        keep = keep.nonzero().squeeze(1)
        found = found.select(keep)
        boxes, clipped = _rows(keep, boxes, clipped)

        ends = found.image.bincount(minlength=len(image_sizes)).cumsum(0)
        results, start = [], 0
        for size, end in zip(image_sizes, ends.tolist(), strict=True):
            own = slice(start, end)
            best = nms_by_class(
                (clipped if self.clip_before_nms else boxes)[own],
                found.scores[own],
                found.classes[own],
                self.nms_thresh,
                self.max_detections,
            )
            if not self.clip_before_nms:
                best = best[self._large(clipped[own][best])]
            pred_boxes, pred_scores, pred_classes = _rows(
                best, clipped[own], found.scores[own], found.classes[own]
            )
            results.append(
                Instances(
                    size,
                    pred_boxes=Boxes(pred_boxes),
                    scores=pred_scores,
                    pred_classes=pred_classes,
                )
            )
            start = end
        return results

    def _large(self, boxes: Tensor) -> Tensor:
        return ((boxes[:, 2:] - boxes[:, :2]) > self.min_box_size).all(1)

    def _candidates(self, logits: Tensor, quality: Tensor | None) -> "_Candidates":
        """Select the pairs of a location and a class above the threshold.

        Most locations have none, so locations are selected by their best class first.
        """
        on_score = self.score_thresh_on == "score"
        # The square root keeps the order, so it is taken last, of the selected scores only.
        sqrt = self.score == "sqrt" and quality is not None
        bound = self.score_thresh
        if sqrt and on_score:
            bound *= abs(bound)
        cls, product = _probabilities(logits.amax(2), quality)
        # If one class is NaN so is the maximum; "not below" keeps the location for its others.
        image, location = (~((product if on_score else cls) <= bound)).nonzero(as_tuple=True)
        cls, product = _probabilities(
            logits[image, location], None if quality is None else quality[image, location, None]
        )
        # With the threshold on the class probability, the quality may still be NaN.
        above = product > bound if on_score else (cls > bound) & (product >= 0)
        row, classes = above.nonzero(as_tuple=True)
        scores = product[row, classes]
        scores = scores.sqrt() if sqrt else scores
        ratings = scores if self.topk_on == "score" else cls[row, classes]
        image, location = _rows(row, image, location)
        found = _Candidates(image, location, classes, scores, ratings)
        # Scores are at most 1, so this sorts by image first; exactly, in float64.
        order = (scores.double() - 2 * found.image).argsort(descending=True, stable=True)
        return found.select(order)

    def _best_per_level(self, found: "_Candidates", locations: Locations) -> "_Candidates":
        """Keep the best candidates of each level of each image, of equal ones the first."""
        if len(found.scores) <= self.topk_candidates:
            return found
        group = found.image * len(locations.level_sizes) + locations.level_of(found.location)
        if group.bincount().max() <= self.topk_candidates:
            return found
        order = found.ratings.argsort(descending=True, stable=True)
        order = order[group[order].argsort(stable=True)]  # by group, then by rating
        ordered = group[order]
        rank = torch.arange(len(order), device=order.device)
        rank = rank - torch.searchsorted(ordered, ordered)  # within its group
        return found.select(order[rank < self.topk_candidates].sort().values)


@dataclass
class _Candidates:
    """R pairs of a location and a class, image by image, best score first."""

    image: Tensor  # (R,) index of the image
    location: Tensor  # (R,) index of the location
    classes: Tensor  # (R,)
    scores: Tensor  # (R,)
    ratings: Tensor  # (R,) class probability or score, by which the best of a level are chosen

    def select(self, index: Tensor) -> "_Candidates":
        """Return the candidates of the given indices, in that order."""
        return _Candidates(*_rows(index, *vars(self).values()))


def _rows(index: Tensor, *tensors: Tensor) -> list[Tensor]:
    """Rows ``index`` (R,) of each tensor; on the CPU three times as fast as ``tensor[index]``."""
    return [x.index_select(0, index) for x in tensors]


def _probabilities(logits: Tensor, quality: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return class probability, and its product with the quality."""
    cls = logits.float().sigmoid()
    return cls, cls if quality is None else cls * quality.float().sigmoid()


def nms_by_class(
    boxes: Tensor, scores: Tensor, classes: Tensor, threshold: float, limit: int
) -> Tensor:
    """Class-wise NMS of one image's boxes.

    torchvision's ``batched_nms`` loops over the classes where there are many boxes, and assumes
    coordinates that are not negative.

    Args:
        boxes: (R, 4), finite, best score first.
        scores: (R,).
        classes: (R,).
        threshold: IoU above which the lower-scored of two boxes of a class is suppressed.
        limit: maximum number of boxes to keep.

    Returns:
        Indices of the boxes to keep, best first.
    """
    if not len(boxes):
        return torch.zeros_like(classes)
    # Shift the classes apart. The offsets are large; float64 keeps the digits of the coordinates.
    low, high = boxes.aminmax()
    boxes = boxes.double() + (classes * (high.double() - low + 1))[:, None]
    scores = scores.double()
    # On the CPU the time of NMS is quadratic in the number of boxes, and the best boxes do not
    # depend on the others: add boxes only until the limit is reached.
    step = max(1, 3 * limit)
    keep = nms(boxes[:step], scores[:step], threshold)
    for start in range(step, len(boxes), step):
        if len(keep) >= limit:
            break
        added = torch.arange(start, min(start + step, len(boxes)), device=boxes.device)
        pool = torch.cat((keep, added))  # best first
        keep = pool[nms(*_rows(pool, boxes, scores), threshold)]
    return keep[:limit]


def decode_boxes(points: Tensor, strides: Tensor, ltrb: Tensor) -> Tensor:
    """Boxes (R, 4), XYXY pixels, from points (R, 2), strides (R,) and ltrb (R, 4) in strides."""
    ltrb = ltrb * strides[:, None]
    return torch.cat((points - ltrb[:, :2], points + ltrb[:, 2:]), dim=1)


def encode_boxes(points: Tensor, strides: Tensor, boxes: Tensor) -> Tensor:
    """Distances l, t, r, b in strides (R, 4); the inverse of :func:`decode_boxes`."""
    return torch.cat((points - boxes[:, :2], boxes[:, 2:] - points), dim=1) / strides[:, None]
