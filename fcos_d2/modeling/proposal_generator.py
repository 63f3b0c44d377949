"""The ROI-free proposal head: locations, head, matcher, losses and decoder put together."""

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.proposal_generator import PROPOSAL_GENERATOR_REGISTRY
from detectron2.structures import ImageList, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from .decoder import FCOSDecoder, encode_boxes
from .head import FCOSHead
from .locations import Locations, compute_locations
from .losses import BOX_LOSSES, FCOSLosses, fcos_losses
from .matcher import CenterSamplingMatcher, Matches


@PROPOSAL_GENERATOR_REGISTRY.register()
class FCOSProposalGenerator(nn.Module):
    """FCOS on any backbone's feature maps, under Detectron2's proposal generator interface.

    It differs from an RPN in what it returns: detections (``pred_boxes``, ``scores``,
    ``pred_classes``), which need no ROI head.
    """

    @configurable
    def __init__(
        self,
        *,
        in_features: list[str],
        strides: list[int],
        head: nn.Module,
        matcher: CenterSamplingMatcher,
        decoder: FCOSDecoder,
        location_offset: float = 0.5,
        box_loss: str = "giou",
        box_loss_weight: str = "none",
        focal_loss_alpha: float = 0.25,
        focal_loss_gamma: float = 2.0,
    ):
        """Put the parts together.

        Args:
            in_features: names of the feature maps to use, finest first.
            strides: stride of each of them.
            head: see :class:`FCOSHead` for its interface.
            matcher: ground truth to locations.
            decoder: predictions to detections.
            location_offset: position of a location in its cell, in strides.
            box_loss: "giou", "iou", "diou" or "ciou".
            box_loss_weight: "none" or "centerness".
            focal_loss_alpha: weight of the positive class.
            focal_loss_gamma: exponent of the focal loss.

        Raises:
            ValueError: an unknown option, or not one range of sizes for each level.
        """
        super().__init__()
        if box_loss not in BOX_LOSSES:
            raise ValueError(f"MODEL.FCOS.BOX_LOSS is {box_loss!r}, not one of {BOX_LOSSES}.")
        if box_loss_weight not in ("none", "centerness"):
            raise ValueError(
                f"MODEL.FCOS.BOX_LOSS_WEIGHT is {box_loss_weight!r}, not 'none' or 'centerness'."
            )
        if len(matcher.ranges) != len(in_features):
            raise ValueError(
                f"{len(in_features)} feature maps (MODEL.FCOS.IN_FEATURES {in_features}) need "
                f"{len(in_features) - 1} bounds in MODEL.FCOS.SIZES_OF_INTEREST, got "
                f"{len(matcher.ranges) - 1}."
            )
        self.in_features = in_features
        self.strides = strides
        self.head = head
        self.matcher = matcher
        self.decoder = decoder
        self.location_offset = location_offset
        self.loss_options = {
            "box_loss_kind": box_loss,
            "box_loss_weight": box_loss_weight,
            "alpha": focal_loss_alpha,
            "gamma": focal_loss_gamma,
        }

    @classmethod
    def from_config(cls, cfg, input_shape: dict[str, ShapeSpec]) -> dict:
        """Map ``cfg.MODEL.FCOS`` to the constructor's arguments."""
        in_features = list(cfg.MODEL.FCOS.IN_FEATURES)
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
            "location_offset": cfg.MODEL.FCOS.LOCATION_OFFSET,
            "box_loss": cfg.MODEL.FCOS.BOX_LOSS,
            "box_loss_weight": cfg.MODEL.FCOS.BOX_LOSS_WEIGHT,
            "focal_loss_alpha": cfg.MODEL.FCOS.FOCAL_LOSS_ALPHA,
            "focal_loss_gamma": cfg.MODEL.FCOS.FOCAL_LOSS_GAMMA,
        }

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        gt_instances: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """Detect, or compute the losses.

        Args:
            images: the batch of N images.
            features: feature maps by name, each (N, C, H_l, W_l).
            gt_instances: in training, for each image ``gt_boxes``, ``gt_classes`` and,
                optionally, ``gt_ignore``.

        Returns:
            In training no detections and ``loss_cls``, ``loss_box``, ``loss_ctr``; otherwise the
            detections of each image (see :class:`FCOSDecoder`) and no losses.
        """
        maps = [features[name] for name in self.in_features]
        logits, ltrb, centerness = self.head(maps)
        locations = compute_locations(
            [x.shape[-2:] for x in maps], self.strides, self.location_offset, logits.device
        )
        if self.training:
            if gt_instances is None:
                raise ValueError("Training needs ground truth: 'instances' in each input.")
            return [], self.losses(locations, logits, ltrb, centerness, gt_instances)
        return self.decoder(locations, logits, ltrb, centerness, images.image_sizes), {}

    def losses(
        self,
        locations: Locations,
        logits: Tensor,
        ltrb: Tensor,
        centerness: Tensor,
        gt_instances: list[Instances],
    ) -> dict[str, Tensor]:
        """Match the ground truth, return the three losses and log what explains them.

        Args:
            locations: the grid of L locations.
            logits: (N, L, K).
            ltrb: (N, L, 4).
            centerness: (N, L).
            gt_instances: see :meth:`forward`.
        """
        matches = self.matcher(locations, gt_instances)
        labels = matches.labels.flatten()
        positive = ((labels >= 0) & (labels < logits.shape[2])).nonzero().squeeze(1)
        place = positive % len(locations.points)
        target_ltrb = encode_boxes(
            locations.points[place],
            locations.strides[place],
            matches.gt_boxes[matches.gt_inds.flatten()[positive]],
        )
        losses = fcos_losses(
            logits.flatten(0, 1),
            ltrb.flatten(0, 1),
            centerness.flatten(),
            labels,
            positive,
            target_ltrb,
            **self.loss_options,
        )
        _log(losses, matches)
        return {
            "loss_cls": losses.loss_cls,
            "loss_box": losses.loss_box,
            "loss_ctr": losses.loss_ctr,
        }


def _log(losses: FCOSLosses, matches: Matches) -> None:
    """Put this rank's num_pos, gt_covered and loss_ctr_excess into the event storage."""
    # Row -1, the background, is the extra one at the end.
    covered = matches.gt_ignore.new_zeros(len(matches.gt_boxes) + 1)
    covered[matches.gt_inds.flatten()] = True
    wanted = ~matches.gt_ignore
    num_covered = (covered[:-1] & wanted).sum()
    # One transfer to the host for all of them.
    num_pos, excess, num_covered, num_wanted = torch.stack(
        [x.float() for x in (losses.num_pos, losses.ctr_excess, num_covered, wanted.sum())]
    ).tolist()
    storage = get_event_storage()
    storage.put_scalar("fcos/num_pos", num_pos)
    storage.put_scalar("fcos/loss_ctr_excess", excess)
    if num_wanted:
        storage.put_scalar("fcos/gt_covered", num_covered / num_wanted)
