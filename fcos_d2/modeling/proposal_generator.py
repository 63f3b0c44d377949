"""`FCOSProposalGenerator`: locations, head, matcher, losses and decoder in one module."""

import functools
import logging
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.proposal_generator import PROPOSAL_GENERATOR_REGISTRY
from detectron2.structures import ImageList, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from ..config import check_option
from .decoder import FCOSDecoder, encode_boxes
from .head import FCOSHead
from .locations import Locations, compute_locations
from .losses import LossOptions, fcos_losses
from .matcher import CenterSamplingMatcher, Matches
from .saved_settings import SavedSettings

logger = logging.getLogger(__name__)


class Predictions(NamedTuple):
    """Head outputs at L locations of N images.

    Attributes:
        locations: the grid.
        logits: (N, L, K).
        ltrb: (N, L, 4), distances in strides.
        quality: (N, L) logits, or None.
    """

    locations: Locations
    logits: Tensor
    ltrb: Tensor
    quality: Tensor | None


@PROPOSAL_GENERATOR_REGISTRY.register()
class FCOSProposalGenerator(SavedSettings):
    """FCOS on any backbone's feature maps.

    Called as a module it is a region proposal network with Detectron2's interface, for
    ``GeneralizedRCNN`` and ``ProposalNetwork``. :class:`FCOS` has no second stage and uses
    :meth:`predict`, then :meth:`losses` or :meth:`detect`.
    """

    saved_settings = ("location_offset", "location_step", "score_rules")

    @configurable
    def __init__(
        self,
        *,
        in_features: list[str],
        strides: list[int],
        head: nn.Module,
        matcher: CenterSamplingMatcher,
        decoder: FCOSDecoder,
        proposal_decoders: tuple[FCOSDecoder, FCOSDecoder] | None = None,
        proposal_loss_weight: float = 1.0,
        location_offset: float = 0.5,
        location_step: str = "stride",
        quality: str = "centerness",
        box_loss: str = "giou",
        box_loss_weight: str = "none",
        focal_loss_alpha: float = 0.25,
        focal_loss_gamma: float = 2.0,
    ):
        """Assemble the parts.

        Args:
            in_features: names of the feature maps to use, finest first.
            strides: their strides.
            head: a module with the interface of :class:`FCOSHead`.
            matcher: matches ground truth to locations.
            decoder: decodes detections.
            proposal_decoders: decode proposals, in training and in testing; required if the module
                is called as a proposal generator.
            proposal_loss_weight: weight of the losses in that case.
            location_offset: position of a location in its cell, in strides.
            location_step: "stride" or "image", see :func:`compute_locations`.
            quality: target of the quality branch: "centerness", "iou" or "none".
            box_loss: see :func:`box_loss`.
            box_loss_weight: "none" or "centerness", see :class:`LossOptions`.
            focal_loss_alpha: see :func:`sigmoid_focal_loss`.
            focal_loss_gamma: see :func:`sigmoid_focal_loss`.

        Raises:
            ValueError: an unknown option, feature maps that are not finest first, or a number of
                size ranges that differs from the number of feature maps.
        """
        super().__init__()
        check_option("MODEL.FCOS.LOCATION_STEP", location_step, ("stride", "image"))
        _check_levels(in_features, strides, len(matcher.ranges))
        self.in_features = in_features
        self.strides = strides
        self.head = head
        self.matcher = matcher
        self.decoder = decoder
        self.proposal_decoders = proposal_decoders
        self.proposal_loss_weight = proposal_loss_weight
        self.location_offset = location_offset
        self.location_step = location_step
        self.loss_options = LossOptions(
            quality, box_loss, box_loss_weight, focal_loss_alpha, focal_loss_gamma
        )

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        """Map ``cfg.MODEL.FCOS`` and, for proposals, ``cfg.MODEL.RPN`` to the arguments."""
        in_features = list(cfg.MODEL.FCOS.IN_FEATURES)
        if not in_features:
            raise ValueError("MODEL.FCOS.IN_FEATURES is empty: name the feature maps of the head.")
        missing = [name for name in in_features if name not in input_shape]
        if missing:
            raise ValueError(
                f"MODEL.FCOS.IN_FEATURES names {missing}, but the backbone has {list(input_shape)}."
            )
        shapes = [input_shape[name] for name in in_features]
        return {
            "in_features": in_features,
            "strides": [shape.stride for shape in shapes],
            "head": FCOSHead(cfg, shapes),
            "matcher": CenterSamplingMatcher(cfg),
            "decoder": FCOSDecoder(cfg),
            "proposal_decoders": (
                _proposal_decoder(cfg, "TRAIN"),
                _proposal_decoder(cfg, "TEST"),
            ),
            "proposal_loss_weight": cfg.MODEL.RPN.LOSS_WEIGHT,
            "location_offset": cfg.MODEL.FCOS.LOCATION_OFFSET,
            "location_step": cfg.MODEL.FCOS.LOCATION_STEP,
            "quality": cfg.MODEL.FCOS.QUALITY,
            "box_loss": cfg.MODEL.FCOS.BOX_LOSS,
            "box_loss_weight": cfg.MODEL.FCOS.BOX_LOSS_WEIGHT,
            "focal_loss_alpha": cfg.MODEL.FCOS.FOCAL_LOSS_ALPHA,
            "focal_loss_gamma": cfg.MODEL.FCOS.FOCAL_LOSS_GAMMA,
        }

    @property
    def score_rules(self) -> dict[str, Any]:
        """Rules of the decoder. Loading others only warns: unlike the locations, they are free."""
        names = ("score", "score_thresh_on", "topk_on", "clip_before_nms")
        return {f"MODEL.FCOS.{name.upper()}": getattr(self.decoder, name) for name in names}

    @score_rules.setter
    def score_rules(self, saved: dict[str, Any]) -> None:
        own = self.score_rules
        different = [f"{k} {v} (now {own[k]})" for k, v in saved.items() if own.get(k, v) != v]
        if different:
            logger.warning("The loaded weights were used with %s.", ", ".join(different))

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        gt_instances: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """Propose regions, as Detectron2's ``RPN`` does.

        Args:
            images: the batch of N images.
            features: feature maps by name, each (N, C, H_l, W_l).
            gt_instances: in training, see :meth:`losses`.

        Returns:
            The proposals of each image, see :meth:`propose`, and in training the losses, whose
            names differ from those of ROI heads (``loss_fcos_cls``, ...).
        """
        predictions = self.predict(images, features)
        losses = {}
        if self.training:
            if gt_instances is None:
                raise ValueError("Training needs ground truth: 'instances' in each input.")
            losses = {
                name.replace("loss_", "loss_fcos_"): loss * self.proposal_loss_weight
                for name, loss in self.losses(predictions, gt_instances).items()
            }
        return self.propose(predictions, images.image_sizes), losses

    def predict(self, images: ImageList, features: dict[str, Tensor]) -> Predictions:
        """Run the head on the feature maps of N images."""
        maps = [features[name] for name in self.in_features]
        logits, ltrb, quality = self.head(maps)
        locations = self._locations(
            tuple(x.shape[-2:] for x in maps),
            images.tensor.shape[-2:] if self.location_step == "image" else None,
            logits,
        )
        return Predictions(locations, logits, ltrb, quality)

    def _locations(
        self,
        level_sizes: tuple[torch.Size, ...],
        image_size: torch.Size | None,
        like: Tensor,
    ) -> Locations:
        # Do not cache under tracing or compilation, where sizes and tensors may be symbolic.
        traced = torch.jit.is_tracing() or torch.compiler.is_compiling()
        compute = _known_locations if type(like) is Tensor and not traced else _new_locations
        return compute(
            level_sizes, tuple(self.strides), self.location_offset, like.device, image_size
        )

    def detect(
        self, predictions: Predictions, image_sizes: list[tuple[int, int]]
    ) -> list[Instances]:
        """Decode detections, see :class:`FCOSDecoder`."""
        return self.decoder(*predictions, image_sizes)

    @torch.no_grad()
    def propose(
        self, predictions: Predictions, image_sizes: list[tuple[int, int]]
    ) -> list[Instances]:
        """Decode proposals: the best class of each location, then class-agnostic NMS.

        Returns:
            For each image ``proposal_boxes`` (XYXY pixels of the network's input, clipped to it)
            and ``objectness_logits``, the logit of the score, best first.
        """
        if self.proposal_decoders is None:
            raise ValueError(
                "This FCOSProposalGenerator has no proposal_decoders: pass them to its constructor."
            )
        decoder = self.proposal_decoders[0 if self.training else 1]
        best_class = predictions._replace(logits=predictions.logits.amax(dim=2, keepdim=True))
        return [
            Instances(
                x.image_size,
                proposal_boxes=x.pred_boxes,
                objectness_logits=torch.logit(x.scores, eps=1e-6),
            )
            for x in decoder(*best_class, image_sizes)
        ]

    def losses(self, predictions: Predictions, gt_instances: list[Instances]) -> dict[str, Tensor]:
        """Match the ground truth, compute the losses and log ``fcos/*`` metrics.

        Args:
            predictions: head outputs of N images.
            gt_instances: for each image ``gt_boxes``, ``gt_classes`` and, optionally,
                ``gt_ignore``.

        Returns:
            ``loss_cls``, ``loss_box`` and, depending on the quality, ``loss_ctr`` or ``loss_iou``.
        """
        return self.matched_losses(predictions, self.matcher(predictions.locations, gt_instances))

    def matched_losses(self, predictions: Predictions, matches: Matches) -> dict[str, Tensor]:
        """Compute the losses for given matches, see :meth:`losses`."""
        locations, logits, ltrb, quality = predictions
        positive = (matches.labels >= 0) & (matches.labels < logits.shape[2])
        image, location = positive.nonzero(as_tuple=True)
        gt_inds = matches.gt_inds[image, location]
        target_ltrb = encode_boxes(
            locations.points[location], locations.strides[location], matches.gt_boxes[gt_inds]
        )
        losses = fcos_losses(
            logits,
            ltrb,
            quality,
            matches.labels,
            (image, location),
            target_ltrb,
            self.loss_options,
        )
        result = {"loss_cls": losses.loss_cls, "loss_box": losses.loss_box}
        metrics = {"num_pos": losses.num_pos}
        if losses.loss_quality is not None and losses.quality_excess is not None:
            name = "loss_ctr" if self.loss_options.quality == "centerness" else "loss_iou"
            result[name] = losses.loss_quality
            metrics[f"{name}_excess"] = losses.quality_excess
        _log(metrics, gt_inds, matches.gt_ignore)
        return result


def _new_locations(*args: Any) -> Locations:
    # Tensors created in inference mode could not be used in training later.
    with torch.inference_mode(False):
        return compute_locations(*args)


_known_locations = functools.lru_cache(maxsize=64)(_new_locations)


def _proposal_decoder(cfg: CfgNode, stage: str) -> FCOSDecoder:
    """Build a decoder with the limits of Detectron2's RPN; ``stage`` is "TRAIN" or "TEST"."""
    return FCOSDecoder(
        score=cfg.MODEL.FCOS.SCORE,
        score_thresh=0.0,
        topk_candidates=cfg.MODEL.RPN[f"PRE_NMS_TOPK_{stage}"],
        nms_thresh=cfg.MODEL.RPN.NMS_THRESH,
        max_detections=cfg.MODEL.RPN[f"POST_NMS_TOPK_{stage}"],
        min_box_size=cfg.MODEL.PROPOSAL_GENERATOR.MIN_SIZE,
    )


def _check_levels(in_features: list[str], strides: list[int], num_ranges: int) -> None:
    if len(in_features) != len(strides):
        raise ValueError(
            f"{len(in_features)} feature maps {list(in_features)} need {len(in_features)} strides, "
            f"got {len(strides)}: {list(strides)}."
        )
    levels = dict(zip(in_features, strides, strict=True))
    if sorted(set(strides)) != list(strides):
        raise ValueError(
            "MODEL.FCOS.IN_FEATURES must name feature maps of increasing stride, finest first; "
            f"got {levels}."
        )
    if num_ranges != len(strides):
        usual = [8 * stride for stride in strides[:-1]]
        raise ValueError(
            f"{len(strides)} feature maps (MODEL.FCOS.IN_FEATURES, strides {levels}) need "
            f"{len(strides) - 1} bounds in MODEL.FCOS.SIZES_OF_INTEREST, got {num_ranges - 1}. "
            f"The usual bounds are 8 strides: {usual}."
        )


def _log(metrics: dict[str, Tensor], gt_inds: Tensor, gt_ignore: Tensor) -> None:
    """Log this rank's metrics, and the share of boxes that have a positive location.

    Args:
        metrics: scalars by name.
        gt_inds: (P,) index of the box of each positive location.
        gt_ignore: (M,) bool.
    """
    covered = torch.zeros_like(gt_ignore).index_fill_(0, gt_inds, True)
    # One host-device sync for all metrics.
    *values, num_covered, num_wanted = torch.stack(
        [x.float() for x in (*metrics.values(), covered.sum(), (~gt_ignore).sum())]
    ).tolist()
    storage = get_event_storage()
    for name, value in zip(metrics, values, strict=True):
        storage.put_scalar(f"fcos/{name}", value)
    if num_wanted:
        storage.put_scalar("fcos/gt_covered", num_covered / num_wanted)
