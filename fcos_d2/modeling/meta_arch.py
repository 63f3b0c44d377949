"""`FCOS`: backbone, proposal generator, pre- and post-processing."""

from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data.detection_utils import convert_image_to_rgb
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.modeling.proposal_generator import build_proposal_generator
from detectron2.structures import ImageList, Instances
from detectron2.utils.events import get_event_storage
from detectron2.utils.visualizer import Visualizer
from torch import Tensor

from ..config import update_names
from .proposal_generator import FCOSProposalGenerator
from .saved_settings import SavedSettings


@META_ARCH_REGISTRY.register()
class FCOS(SavedSettings):
    """FCOS: Fully Convolutional One-Stage Object Detection (Tian et al., 2019).

    The state dict holds the pixel statistics and the channel order that the weights were trained
    with. Images in the other order, of RGB and BGR, are converted.
    """

    saved_settings = ("trained_format",)

    pixel_mean: Tensor  # (C, 1, 1)
    pixel_std: Tensor  # (C, 1, 1)

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        proposal_generator: FCOSProposalGenerator,
        pixel_mean: list[float],
        pixel_std: list[float],
        input_format: str = "BGR",
        vis_period: int = 0,
    ):
        """Combine the parts.

        Args:
            backbone: a module with Detectron2's backbone interface.
            proposal_generator: computes predictions, losses and detections from feature maps.
            pixel_mean: per-channel mean, subtracted from the images.
            pixel_std: per-channel standard deviation, which the images are divided by.
            input_format: channel order of the images, "BGR" or "RGB".
            vis_period: iterations between two visualizations of training; 0 for none.

        Raises:
            ValueError: a feature map that the backbone lacks, or has at another stride.
        """
        super().__init__()
        _check_levels(backbone, proposal_generator)
        self.backbone = backbone
        self.proposal_generator = proposal_generator
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1))
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1))
        self.input_format = input_format
        self.trained_format = input_format
        self.vis_period = vis_period

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Map ``cfg`` to the constructor's arguments."""
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
        """Device of the model, which images are moved to."""
        return self.pixel_mean.device

    def set_extra_state(self, state: Tensor) -> None:
        """Set the channel order of the weights.

        Raises:
            ValueError: ``input_format`` can't be converted to it.
        """
        super().set_extra_state(state)
        formats = {self.trained_format, self.input_format}
        if len(formats) > 1 and formats != {"RGB", "BGR"}:
            raise ValueError(
                f"The weights were trained on {self.trained_format} images, which "
                f"{self.input_format} images can't be converted to: set INPUT.FORMAT."
            )

    def forward(self, batched_inputs: list[dict]) -> dict[str, Tensor] | list[dict]:
        """Compute losses in training, detections otherwise.

        Args:
            batched_inputs: a dict per image in Detectron2's standard format: ``image`` (C, H, W)
                in ``input_format``, ``height`` and ``width`` of the output and, in training,
                ``instances`` with ``gt_boxes``, ``gt_classes`` and, optionally, ``gt_ignore``.

        Returns:
            In training the losses, see :meth:`FCOSProposalGenerator.losses`. Otherwise
            ``{"instances": Instances}`` per image, with ``pred_boxes``, ``scores`` and
            ``pred_classes`` at the size of the output.

        Raises:
            ValueError: in training, an input without ``instances`` or with an unknown class.
        """
        images = self.preprocess_image(batched_inputs)
        features = self.backbone(images.tensor)
        predictions = self.proposal_generator.predict(images, features)
        if self.training:
            gt_instances = self._ground_truth(batched_inputs)
            if self.vis_period > 0 and get_event_storage().iter % self.vis_period == 0:
                detections = self.proposal_generator.detect(predictions, images.image_sizes)
                self.visualize_training(batched_inputs[0], detections[0])
            return self.proposal_generator.losses(predictions, gt_instances)
        detections = self.proposal_generator.detect(predictions, images.image_sizes)
        return [
            {"instances": detector_postprocess(x, *output_size(inputs, x.image_size))}
            for x, inputs in zip(detections, batched_inputs, strict=True)
        ]

    def preprocess_image(self, batched_inputs: list[dict]) -> ImageList:
        """Convert, normalize, pad and batch the images."""
        images = [x["image"].to(self.device) for x in batched_inputs]
        if self.input_format != self.trained_format:
            images = [x.flip(0) for x in images]
        images = [(x - self.pixel_mean) / self.pixel_std for x in images]
        return ImageList.from_tensors(images, self.backbone.size_divisibility)

    def visualize_training(self, inputs: dict, detections: Instances) -> None:
        """Log an image with the best 20 detections on the left, ground truth on the right."""
        image = convert_image_to_rgb(inputs["image"].permute(1, 2, 0), self.input_format)
        best = detections.pred_boxes.tensor[:20].cpu().numpy()
        truth = inputs["instances"].gt_boxes.tensor.cpu().numpy()
        pictures = [
            Visualizer(image).overlay_instances(boxes=boxes).get_image() for boxes in (best, truth)
        ]
        get_event_storage().put_image(
            "Left: best 20 predictions; right: ground truth",
            np.concatenate(pictures, axis=1).transpose(2, 0, 1),
        )

    def _ground_truth(self, batched_inputs: list[dict]) -> list[Instances]:
        """Return the instances, on the device they are on: the matcher moves them together."""
        num_classes = self.proposal_generator.matcher.num_classes
        for inputs in batched_inputs:
            name = inputs.get("file_name", "an input")
            if "instances" not in inputs:
                raise ValueError(f"Training needs ground truth, but {name} has no 'instances'.")
            # Otherwise trained as background. The data loader's classes are on the CPU: no sync.
            classes = inputs["instances"].gt_classes
            if len(classes) and not 0 <= int(classes.min()) <= int(classes.max()) < num_classes:
                raise ValueError(
                    f"{name} has the classes {sorted(set(classes.tolist()))}, but "
                    f"MODEL.FCOS.NUM_CLASSES is {num_classes}: classes go from 0 to "
                    f"{num_classes - 1}."
                )
        return [x["instances"] for x in batched_inputs]


def output_size(inputs: dict, image_size: tuple[int, int]) -> tuple[int, int]:
    """Return (height, width) of an input's output; by default the size of the image."""
    return inputs.get("height", image_size[0]), inputs.get("width", image_size[1])


def _check_levels(backbone: Backbone, proposal_generator: FCOSProposalGenerator) -> None:
    strides = {name: shape.stride for name, shape in backbone.output_shape().items()}
    levels = zip(proposal_generator.in_features, proposal_generator.strides, strict=True)
    for name, stride in levels:
        if strides.get(name) != stride:
            raise ValueError(
                f"The proposal generator takes {name} with stride {stride}, but the backbone has "
                f"the strides {strides}."
            )
