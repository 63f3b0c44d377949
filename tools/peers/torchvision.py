"""torchvision's FCOS."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn
from torchvision.models.detection import FCOS
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.image_list import ImageList
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from .base import HeadOutputs, Levels, Peer, Size


class _ReturnMatches(nn.Module):
    """A head whose losses are the matches: ``FCOS.compute_loss`` then does the matching alone."""

    def compute_loss(
        self, targets: Any, head_outputs: Any, anchors: Any, matched_idxs: list[Tensor]
    ) -> list[Tensor]:
        return matched_idxs


class Torchvision(Peer):
    """torchvision's FCOS.

    Attributes:
        class_indices: outputs of the class predictor that stand for classes.
    """

    name = "torchvision"

    def __init__(self, model: FCOS):
        super().__init__(
            model,
            model.head,
            towers=("classification_head.conv", "regression_head.conv"),
            predictors=(
                "classification_head.cls_logits",
                "regression_head.bbox_reg",
                "regression_head.bbox_ctrness",
            ),
        )
        self.num_outputs = model.head.classification_head.num_classes
        self.class_indices = torch.arange(self.num_outputs)
        self.matching = FCOS(model.backbone, self.num_outputs, head=_ReturnMatches())

    @classmethod
    def build(cls, num_classes: int, depth: int, like_torchvision: bool = True) -> "Torchvision":
        # Without resizing; batch norms and two stages are frozen, as with pretrained weights.
        backbone = resnet_fpn_backbone(
            backbone_name=f"resnet{depth}",
            weights=None,
            trainable_layers=3,
            returned_layers=[2, 3, 4],
            extra_blocks=LastLevelP6P7(256, 256),
        )
        return cls(FCOS(backbone, num_classes, _skip_resize=True))

    def set_training(self, training: bool) -> None:
        super().set_training(training)
        self.model.transform.train()  # in evaluation mode it resizes in any case

    def inputs(self, samples: Sequence[dict]) -> tuple:
        images = [x["image"] / 255 for x in samples]
        return (images, self.ground_truth(samples)) if "instances" in samples[0] else (images,)

    def as_instances(self, detections: Any) -> list[Instances]:
        result = []
        for x in detections:
            # Outputs that stand for no class are never detected.
            classes = torch.searchsorted(self.class_indices.to(x["labels"]), x["labels"])
            fields = {"pred_boxes": Boxes(x["boxes"]), "pred_classes": classes}
            result.append(Instances((0, 0), scores=x["scores"], **fields))
        return result

    def flatten(self, outputs: Mapping[str, Tensor]) -> HeadOutputs:
        logits, ltrb, centerness = outputs.values()
        return HeadOutputs(logits[..., self.class_indices], ltrb, centerness.squeeze(2))

    def ground_truth(self, samples: Sequence[dict]) -> list[dict[str, Tensor]]:
        result = []
        for x in (x["instances"] for x in samples):
            labels = self.class_indices.to(x.gt_classes)[x.gt_classes]
            result.append({"boxes": x.gt_boxes.tensor, "labels": labels})
        return result

    def grid(self, levels: Levels, image_size: Size) -> tuple[list[Tensor], list[int]]:
        logits = [x.logits for x in levels]
        num_images = len(logits[0])
        images = logits[0].new_empty(1).expand(num_images, 3, *image_size)
        anchors = self.model.anchor_generator(ImageList(images, [image_size] * num_images), logits)
        return anchors, [x.shape[2] * x.shape[3] for x in logits]

    @torch.no_grad()
    def match(self, grid: Any, ground_truth: Any) -> list[Tensor]:
        return self.matching.compute_loss(ground_truth, {}, *grid)

    def labels(self, matches: Any, ground_truth: Any) -> Tensor:
        background = ground_truth[0]["labels"].new_full((1,), self.num_outputs)  # index -1
        labels = [torch.cat((x["labels"], background)) for x in ground_truth]
        return torch.stack([x[indices] for x, indices in zip(labels, matches, strict=True)])

    def loss(self, grid: Any, levels: Levels, matches: Any, ground_truth: Any) -> Tensor:
        outputs = self.bare_head(levels)
        return sum(self.head.compute_loss(ground_truth, outputs, grid[0], matches).values())

    def decode(self, grid: Any, outputs: Any, image_sizes: list[Size]) -> Any:
        anchors, lengths = grid
        per_level = {name: list(x.split(lengths, dim=1)) for name, x in outputs.items()}
        anchors = [list(x.split(lengths)) for x in anchors]
        return self.model.postprocess_detections(per_level, anchors, image_sizes)


ADAPTER = Torchvision
