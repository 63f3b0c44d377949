"""fcos_d2 itself."""

from typing import Any

from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from fcos_d2.checkpoint.architecture import build_cfg
from fcos_d2.checkpoint.convert import Converted
from fcos_d2.modeling import compute_locations
from fcos_d2.modeling.proposal_generator import Predictions

from .base import HeadOutputs, Levels, Peer, Size


class Ours(Peer):
    """fcos_d2's FCOS."""

    name = "fcos_d2"

    def __init__(self, model: nn.Module):
        self.generator = model.proposal_generator
        self.input_format = model.input_format
        super().__init__(
            model,
            self.generator.head,
            towers=("share_tower", "cls_tower", "box_tower"),
            predictors=("cls_score", "box_pred", "centerness"),
        )

    @classmethod
    def build(cls, converted: Converted) -> "Ours":
        """Build the model with the weights and options of another library's checkpoint."""
        cfg = build_cfg(converted.cfg, len(converted.class_indices))
        cfg.MODEL.DEVICE = "cpu"
        model = build_model(cfg)
        model.load_state_dict(converted.weights, strict=False)
        return cls(model)

    def flatten(self, outputs: tuple[Tensor, Tensor, Tensor]) -> HeadOutputs:
        return HeadOutputs(*outputs)

    def grid(self, levels: Levels, image_size: Size) -> Any:
        return compute_locations(
            [x.logits.shape[-2:] for x in levels],
            self.generator.strides,
            self.generator.location_offset,
            levels[0].logits.device,
            image_size=image_size if self.generator.location_step == "image" else None,
        )

    def match(self, grid: Any, ground_truth: Any) -> Any:
        return self.generator.matcher(grid, ground_truth)

    def labels(self, matches: Any, ground_truth: Any) -> Tensor:
        return matches.labels

    def loss(self, grid: Any, levels: Levels, matches: Any, ground_truth: Any) -> Tensor:
        with EventStorage():
            predictions = Predictions(grid, *self.bare_head(levels))
            return sum(self.generator.matched_losses(predictions, matches).values())

    def decode(self, grid: Any, outputs: Any, image_sizes: list[Size]) -> Any:
        return self.generator.detect(Predictions(grid, *outputs), image_sizes)
