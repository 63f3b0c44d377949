"""`FCOSDecoder`: predictions at locations to detected `Instances`."""

from collections.abc import Sequence

import torch
from detectron2.config import configurable
from detectron2.structures import Boxes, Instances
from torch import Tensor
from torchvision.ops import nms

from .locations import Locations


class FCOSDecoder:
    """Score, select, decode, clip and suppress (paper, section 3.1, "inference").

    All images and levels go through each step together. Only locations whose best class is above
    the threshold are looked at class by class.
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
        limits = _limits(image_sizes, like=locations.points)
        image, place, classes, scores, rating = self._candidates(logits, quality)
        points, strides = _take(place, locations.points, locations.strides)
        boxes = decode_boxes(points, strides, ltrb[image, place].float())
        clipped = boxes.clamp(min=0).minimum(limits.index_select(0, image))
        keep = self._large(clipped) if self.clip_before_nms else boxes.isfinite().all(1)
        if self._may_have_too_many(locations, image, place):
            keep &= self._is_among_best(locations, image, place, rating)
        boxes, clipped, scores, classes, image = _filter(
            keep, boxes, clipped, scores, classes, image
        )
        # On the CPU the time of NMS grows with the square of the boxes; elsewhere each call costs
        # launches and a wait. A trace can't hold the number of boxes of each image.
        by_image = boxes.device.type == "cpu" and not torch.jit.is_tracing()
        suppress = _suppress_by_image if by_image else suppress_at_once
        kept = suppress(
            clipped if self.clip_before_nms else boxes,
            scores,
            classes,
            image,
            len(image_sizes),
            self.nms_thresh,
            self.max_detections,
        )
        results = []
        for size, best in zip(image_sizes, kept, strict=True):
            if not self.clip_before_nms:
                best = best[self._large(clipped[best])]
            pred_boxes, pred_scores, pred_classes = _take(best, clipped, scores, classes)
            results.append(
                Instances(
                    size,
                    pred_boxes=Boxes(pred_boxes),
                    scores=pred_scores,
                    pred_classes=pred_classes,
                )
            )
        return results

    def _large(self, boxes: Tensor) -> Tensor:
        return ((boxes[:, 2:] - boxes[:, :2]) > self.min_box_size).all(1)

    def _candidates(
        self, logits: Tensor, quality: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return what is above the threshold: image, location, class, score, rating (R,) each.

        Image by image, best score first. The rating is what the best of a level are chosen by.
        """
        on_score = self.score_thresh_on == "score"
        # The root is taken of what is left: it changes no order.
        root = self.score == "sqrt" and quality is not None
        bound = self.score_thresh
        if root and on_score:
            bound *= abs(bound)
        # The score grows with the probability, so the best class tells whether any is above. Only
        # what is surely not goes: the maximum of classes of which one is NaN is NaN.
        cls, product = _rate(logits.amax(2), quality)
        cell = (~((product if on_score else cls) <= bound)).flatten().nonzero().squeeze(1)
        image, place = _divide(cell, logits.shape[1])
        own_quality = None if quality is None else _take(cell, quality.flatten())[0][:, None]
        cls, product = _rate(logits[image, place], own_quality)
        # With the threshold on the probability, the quality may still be NaN.
        above = product > bound if on_score else (cls > bound) & (product >= 0)
        entry = above.flatten().nonzero().squeeze(1)
        (scores,) = _take(entry, product.flatten())
        scores = scores.sqrt_() if root else scores
        # A score is at most 1: images stay one after the other, exactly so in float64.
        row, classes = _divide(entry, logits.shape[2])
        image, place = _take(row, image, place)
        order = (scores.double() - 2 * image).argsort(descending=True, stable=True)
        entry, image, place, classes, scores = _take(order, entry, image, place, classes, scores)
        rating = scores if self.topk_on == "score" else _take(entry, cls.flatten())[0]
        return image, place, classes, scores, rating

    def _may_have_too_many(self, locations: Locations, image: Tensor, place: Tensor) -> bool:
        """Tell whether a level may have more candidates than are kept of it."""
        if torch.jit.is_tracing():
            return True
        if len(place) <= self.topk_candidates or place.device.type != "cpu":
            return len(place) > self.topk_candidates  # asking for more would wait for the device
        group = _group(locations, image, place)
        return bool(group.bincount().max() > self.topk_candidates)

    def _is_among_best(
        self, locations: Locations, image: Tensor, place: Tensor, rating: Tensor
    ) -> Tensor:
        """Tell which candidates are among the best of their level, of equal ones the first."""
        group = _group(locations, image, place)
        if self.topk_on == "score":  # they come in this order
            order = group.argsort(stable=True)
        else:
            order = rating.argsort(descending=True, stable=True)
            order = order[group[order].argsort(stable=True)]
        ordered = group[order]
        position = torch.arange(len(order), device=order.device)
        position = position - torch.searchsorted(ordered, ordered)
        return torch.empty_like(order).scatter_(0, order, position) < self.topk_candidates


def _limits(image_sizes: list[tuple[int, int]], like: Tensor) -> Tensor:
    """Return (width, height, width, height) of each image, (N, 4)."""
    if torch.jit.is_tracing():  # Detectron2's sizes are tensors there, and stay variables
        sizes = torch.stack([torch.as_tensor(size) for size in image_sizes])
        return sizes.to(like).flip(1).repeat(1, 2)
    return like.new_tensor([(width, height, width, height) for height, width in image_sizes])


def _group(locations: Locations, image: Tensor, place: Tensor) -> Tensor:
    """Number the levels of all images through."""
    return image * len(locations.level_sizes) + locations.level_of(place)


def _rate(logits: Tensor, quality: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return class probability, and its product with the quality."""
    cls = logits.float().sigmoid()
    return cls, cls if quality is None else cls * quality.float().sigmoid()


def suppress_at_once(
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor,
    image: Tensor,
    num_images: int,
    threshold: float,
    limit: int,
) -> list[Tensor]:
    """Class-wise NMS in one call: for each image up to ``limit`` indices, best first.

    (``batched_nms`` does this only for few boxes, and goes through the classes one by one for
    many; and it takes coordinates for positive.)

    Args:
        boxes: (R, 4), finite, image by image, best score first.
        scores: (R,).
        classes: (R,).
        image: (R,) index of the image.
        num_images: number of images.
        threshold: IoU above which the lower of two boxes is suppressed.
        limit: indices for an image at most.
    """
    group = image * (1 + (classes.max() if len(classes) else 0)) + classes
    keep = nms(_move_apart(boxes, group), scores.double(), threshold)
    return [keep[image[keep] == index][:limit] for index in range(num_images)]


def _suppress_by_image(
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor,
    image: Tensor,
    num_images: int,
    threshold: float,
    limit: int,
) -> list[Tensor]:
    """Give the same as :func:`suppress_at_once`, image by image.

    What the best boxes suppress does not depend on the others: these are looked at only until as
    many are kept as are wanted.
    """
    counts = image.bincount(minlength=num_images).tolist()
    step = max(1, 3 * limit)
    kept, offset = [], 0
    for own_boxes, own_scores in zip(
        _move_apart(boxes, classes).split(counts), scores.double().split(counts), strict=True
    ):
        keep = nms(own_boxes[:step], own_scores[:step], threshold)
        for start in range(step, len(own_scores), step):
            if len(keep) >= limit:
                break
            more = torch.arange(start, min(start + step, len(own_scores)))
            pool = torch.cat((keep, more))  # best first
            keep = pool[nms(*_take(pool, own_boxes, own_scores), threshold)]
        kept.append(offset + keep[:limit])
        offset += len(own_scores)
    return kept


def _filter(keep: Tensor, *tensors: Tensor) -> Sequence[Tensor]:
    """Return the rows of each tensor where ``keep`` (R,) is true."""
    if keep.device.type == "cpu" and not torch.jit.is_tracing() and keep.all():
        return tensors  # mostly so; elsewhere asking costs a wait
    return _take(keep.nonzero().squeeze(1), *tensors)


def _divide(index: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Split an index into a flattened (.., count) into row and column."""
    row = index.div(count, rounding_mode="floor")
    return row, index - row * count


def _take(index: Tensor, *tensors: Tensor) -> list[Tensor]:
    """Return the rows ``index`` (R,) of each tensor, three times as fast as ``tensor[index]``."""
    return [x.index_select(0, index) for x in tensors]


def _move_apart(boxes: Tensor, group: Tensor) -> Tensor:
    """Move boxes of other groups apart by the largest extent.

    These offsets are large, so it is done in float64.
    """
    if not len(boxes):
        return boxes.double()
    low, high = boxes.aminmax()
    return boxes.double() + (group * (high.double() - low + 1))[:, None]


def decode_boxes(points: Tensor, strides: Tensor, ltrb: Tensor) -> Tensor:
    """Boxes (R, 4), XYXY pixels, of points (R, 2), strides (R,), distances in strides (R, 4)."""
    ltrb = ltrb * strides[:, None]
    return torch.cat((points - ltrb[:, :2], points + ltrb[:, 2:]), dim=1)


def encode_boxes(points: Tensor, strides: Tensor, boxes: Tensor) -> Tensor:
    """Distances l, t, r, b in strides (R, 4), the inverse of :func:`decode_boxes`."""
    return torch.cat((points - boxes[:, :2], boxes[:, 2:] - points), dim=1) / strides[:, None]
