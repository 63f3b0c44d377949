"""`FCOS`: backbone and proposal head, with pre- and post-processing around them."""

import numpy as np
import torch
from detectron2.config import configurable
from detectron2.data.detection_utils import convert_image_to_rgb
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.modeling.proposal_generator import build_proposal_generator
from detectron2.structures import ImageList, Instances
from detectron2.utils.events import get_event_storage
from detectron2.utils.visualizer import Visualizer
from torch import Tensor, nn

from ..config import update_names


@META_ARCH_REGISTRY.register()
class FCOS(nn.Module):
    """FCOS: Fully Convolutional One-Stage Object Detection (Tian et al., 2019)."""

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        proposal_generator: nn.Module,
        pixel_mean: list[float],
        pixel_std: list[float],
        input_format: str = "BGR",
        vis_period: int = 0,
    ):
        """Put the parts together.

        Args:
            backbone: a module with Detectron2's backbone interface.
            proposal_generator: see :class:`FCOSProposalGenerator` for its interface.
            pixel_mean: mean of each channel, subtracted from the input.
            pixel_std: standard deviation of each channel, by which the input is divided.
            input_format: order of the channels, needed to draw them.
            vis_period: iterations between two pictures of training; 0 draws none.

        Raises:
            ValueError: a feature map that the backbone has not, or has with another stride.
        """
        super().__init__()
        _check_levels(backbone, proposal_generator)
        self.backbone = backbone
        self.proposal_generator = proposal_generator
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)
        self.input_format = input_format
        self.vis_period = vis_period

    @classmethod
    def from_config(cls, cfg) -> dict:
        """Map ``cfg.MODEL`` to the constructor's arguments."""
        if cfg.MODEL.FCOS.CLASS_AGNOSTIC:
            raise ValueError(
                "MODEL.FCOS.CLASS_AGNOSTIC is for proposals: with MODEL.META_ARCHITECTURE FCOS "
                "every detection would be of class 0."
            )
        cfg = cfg.clone()
        cfg.defrost()
        update_names(cfg)  # a config.yaml of an earlier version, read by Detectron2 itself
        backbone = build_backbone(cfg)
        return {
            "backbone": backbone,
            "proposal_generator": build_proposal_generator(cfg, backbone.output_shape()),
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "input_format": cfg.INPUT.FORMAT,
            "vis_period": cfg.VIS_PERIOD,
        }

    @property
    def device(self) -> torch.device:
        """Where the model is, and so where the images go."""
        return self.pixel_mean.device

    def forward(self, batched_inputs: list[dict]) -> dict[str, Tensor] | list[dict]:
        """Detect objects, or compute the losses.

        Args:
            batched_inputs: for each image a dict in Detectron2's standard format: ``image``
                (C, H, W) in ``input_format``, ``height`` and ``width`` of the output, and in
                training ``instances`` with ``gt_boxes``, ``gt_classes`` and, optionally,
                ``gt_ignore``.

        Returns:
            In training the losses (:meth:`FCOSProposalGenerator.losses`); otherwise for each
            image ``{"instances": Instances}`` with ``pred_boxes``, ``scores`` and
            ``pred_classes`` at the output's size.

        Raises:
            ValueError: training without ``instances``, or with a class that the head lacks.
        """
        images = self.preprocess_image(batched_inputs)
        features = self.backbone(images.tensor)
        predictions = self.proposal_generator.predict(images, features)
        if self.training:
            gt_instances = self._ground_truth(batched_inputs)
            if self.vis_period > 0 and get_event_storage().iter % self.vis_period == 0:
                detections = self.proposal_generator.detect(predictions, images.image_sizes)
                _visualize_training(batched_inputs[0], detections[0], self.input_format)
            return self.proposal_generator.losses(predictions, gt_instances)
        detections = self.proposal_generator.detect(predictions, images.image_sizes)
        return [
            {"instances": detector_postprocess(x, *output_size(inputs, x.image_size))}
            for x, inputs in zip(detections, batched_inputs, strict=True)
        ]

    def preprocess_image(self, batched_inputs: list[dict]) -> ImageList:
        """Normalize the images and pad them to one batch."""
        images = [x["image"].to(self.device) for x in batched_inputs]
        images = [(x - self.pixel_mean) / self.pixel_std for x in images]
        return ImageList.from_tensors(images, self.backbone.size_divisibility)

    def _ground_truth(self, batched_inputs: list[dict]) -> list[Instances]:
        num_classes = self.proposal_generator.matcher.num_classes
        for inputs in batched_inputs:
            name = inputs.get("file_name", "an input")
            if "instances" not in inputs:
                raise ValueError(f"Training needs ground truth, but {name} has no 'instances'.")
            # An error instead of a label that is silently trained as background; checked where the
            # data loader left the classes, on the CPU, so that nothing waits for the device.
            classes = inputs["instances"].gt_classes
            if len(classes) and not 0 <= int(classes.min()) <= int(classes.max()) < num_classes:
                raise ValueError(
                    f"{name} has the classes {sorted(set(classes.tolist()))}, but "
                    f"MODEL.FCOS.NUM_CLASSES is {num_classes}: classes go from 0 to "
                    f"{num_classes - 1}."
                )
        # They stay where they are: the matcher moves what it needs, all images at once.
        return [x["instances"] for x in batched_inputs]


def _check_levels(backbone: Backbone, proposal_generator: nn.Module) -> None:
    strides = {name: shape.stride for name, shape in backbone.output_shape().items()}
    levels = zip(proposal_generator.in_features, proposal_generator.strides, strict=True)
    for name, stride in levels:
        if strides.get(name) != stride:
            raise ValueError(
                f"The proposal generator takes {name} with stride {stride}, but the backbone has "
                f"the strides {strides}."
            )


def _visualize_training(inputs: dict, detections: Instances, input_format: str) -> None:
    """Put an image, predictions left and ground truth right, into events."""
    image = convert_image_to_rgb(inputs["image"].permute(1, 2, 0), input_format)
    best = detections.pred_boxes.tensor[:20].cpu().numpy()
    truth = inputs["instances"].gt_boxes.tensor.cpu().numpy()
    pictures = [
        Visualizer(image).overlay_instances(boxes=boxes).get_image() for boxes in (best, truth)
    ]
    get_event_storage().put_image(
        "Left: best 20 predictions; right: ground truth",
        np.concatenate(pictures, axis=1).transpose(2, 0, 1),
    )


def output_size(inputs: dict, image_size: tuple[int, int]) -> tuple[int, int]:
    """Return (height, width) of the output: what an input says, or else the image's own."""
    return inputs.get("height", image_size[0]), inputs.get("width", image_size[1])
