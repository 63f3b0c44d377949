"""Common interface to FCOS implementations."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from detectron2.modeling.backbone import FPN, BasicStem, ResNet
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from detectron2.structures import Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

Size = tuple[int, int]  # height, width
STRIDES = (8, 16, 32, 64, 128)
# ImageNet's statistics of RGB images in 0..255, as torchvision's models have them.
PIXEL_MEAN = [123.675, 116.28, 103.53]
PIXEL_STD = [58.395, 57.12, 57.375]


class LevelOutputs(NamedTuple):
    """Outputs of the last convolutions at one level."""

    logits: Tensor  # (N, K, H_l, W_l)
    ltrb: Tensor  # (N, 4, H_l, W_l), in strides, before the ReLU
    centerness: Tensor  # (N, 1, H_l, W_l)


Levels = Sequence[LevelOutputs]


class HeadOutputs(NamedTuple):
    """Predictions at all L locations."""

    logits: Tensor  # (N, L, K)
    ltrb: Tensor  # (N, L, 4), in strides
    centerness: Tensor  # (N, L)


class Peer(ABC):
    """FCOS of one library: the whole model, and the steps of detection one by one.

    Samples are Detectron2's: dicts with ``image`` (3, H, W), uint8, RGB, and in training
    ``instances``. ``Any`` stands for the library's own form of a thing. The defaults are those of
    Detectron2's models.

    Attributes:
        name: name of the library.
        input_format: "RGB" or "BGR", as the model expects its images.
        model: the detector.
        head: its head.
        predictors: the last convolutions of the head: class, box, centerness.
        bare_head: the head without its convolutions: (LevelOutputs of each level) to head outputs.
        counterpart: fcos_d2 with the same weights and rules; None for fcos_d2 itself.
    """

    name: str
    input_format = "RGB"
    counterpart: "Peer | None" = None

    def __init__(
        self, model: nn.Module, head: nn.Module, towers: Sequence[str], predictors: Sequence[str]
    ):
        self.model = model
        self.head = head
        self.predictors = [head.get_submodule(name) for name in predictors]
        self.bare_head = _without_convolutions(head, towers, predictors)

    @classmethod
    def build(cls, num_classes: int, depth: int, like_torchvision: bool = True) -> "Peer":
        """Build the model as its library does, with a ResNet of this depth.

        Args:
            num_classes: outputs of the class predictor.
            depth: 18 or 50.
            like_torchvision: take torchvision's RGB images and strides in 3x3 convolutions, where
                the library's own models have others.
        """
        raise NotImplementedError

    def set_training(self, training: bool) -> None:
        """Switch the model between training and inference."""
        self.model.train(training)

    def inputs(self, samples: Sequence[dict]) -> tuple:
        """Return the arguments of the model."""
        if self.input_format == "RGB":
            return (list(samples),)
        return ([{**x, "image": x["image"].flip(0)} for x in samples],)

    def losses(self, inputs: tuple) -> dict[str, Tensor]:
        """Run the model in training mode: class, box and centerness loss."""
        with EventStorage():
            return self.model(*inputs)

    def mean_losses(self, inputs: tuple) -> list[Tensor]:
        """Return the three losses, each divided by the number of positives (at least 1)."""
        return list(self.losses(inputs).values())

    def detect(self, inputs: tuple) -> Any:
        """Run the model in inference mode."""
        return self.model(*inputs)

    def as_instances(self, detections: Any) -> list[Instances]:
        """Convert the detections of :meth:`detect` or :meth:`decode`."""
        return [x if isinstance(x, Instances) else x["instances"] for x in detections]

    @torch.no_grad()
    def detect_with_outputs(self, samples: Sequence[dict]) -> tuple[list[Instances], HeadOutputs]:
        """Return detections and what the head predicted on the way."""
        outputs: list[HeadOutputs] = []

        def record(module: nn.Module, inputs: Any, output: Any) -> None:
            # Copies: Detectron2's FCOS changes its logits in place.
            outputs.append(HeadOutputs(*(x.clone() for x in self.flatten(output))))

        hook = self.head.register_forward_hook(record)
        self.set_training(False)
        try:
            detections = self.as_instances(self.detect(self.inputs(samples)))
        finally:
            hook.remove()
        return detections, outputs[0]

    def flatten(self, outputs: Any) -> HeadOutputs:
        """Convert the outputs of the head: here a list of maps per predictor."""
        logits, ltrb, centerness = (
            torch.cat([x.flatten(2) for x in maps], dim=2).transpose(1, 2) for maps in outputs[:3]
        )
        return HeadOutputs(logits, ltrb.relu(), centerness.squeeze(2))

    def ground_truth(self, samples: Sequence[dict]) -> Any:
        """Return the ground truth that :meth:`match` takes."""
        return [x["instances"] for x in samples]

    @abstractmethod
    def grid(self, levels: Levels, image_size: Size) -> Any:
        """Compute locations or anchors; ``image_size`` is the padded (height, width)."""

    @abstractmethod
    def match(self, grid: Any, ground_truth: Any) -> Any:
        """Assign the ground truth to the grid, in the form that :meth:`loss` takes."""

    @abstractmethod
    def labels(self, matches: Any, ground_truth: Any) -> Tensor:
        """Return the class of each location (N, L), K for background."""

    @abstractmethod
    def loss(self, grid: Any, levels: Levels, matches: Any, ground_truth: Any) -> Tensor:
        """Return the sum of the losses."""

    @abstractmethod
    def decode(self, grid: Any, outputs: Any, image_sizes: list[Size]) -> Any:
        """Turn the outputs of :attr:`bare_head` into detections."""


class _Select(nn.Module):
    """Stands for a convolution: returns its input, or one item of it."""

    def __init__(self, index: int | None = None):
        super().__init__()
        self.index = index

    def forward(self, x: Any, *unused: Any) -> Any:
        return x if self.index is None else x[self.index]


def _without_convolutions(
    head: nn.Module, towers: Sequence[str], predictors: Sequence[str]
) -> nn.Module:
    head = copy.deepcopy(head)
    replacements: dict[str, nn.Module] = {name: _Select() for name in towers}
    replacements.update({name: _Select(index) for index, name in enumerate(predictors)})
    for path, module in replacements.items():
        parent, _, name = path.rpartition(".")
        setattr(head.get_submodule(parent), name, module)
    return head


def build_resnet_fpn(depth: int, stride_in_1x1: bool) -> FPN:
    """Build Detectron2's ResNet with FPN; batch norms and the first two stages are frozen."""
    options = {} if depth < 50 else {"stride_in_1x1": stride_in_1x1}
    in_features = ["res3", "res4", "res5"]
    bottom_up = ResNet(
        BasicStem(norm="FrozenBN"),
        ResNet.make_default_stages(depth, norm="FrozenBN", **options),
        out_features=in_features,
        freeze_at=2,
    )
    return FPN(bottom_up, in_features, 256, top_block=LastLevelP6P7(256, 256, "p5"))
