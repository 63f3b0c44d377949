"""Other libraries' own FCOS behind one face, to be compared with ours."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import FPN, BasicStem, ResNet
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from torchvision.models.detection import fcos_resnet50_fpn

from fcos_d2.checkpoint.convert import Converted


class Sample(NamedTuple):
    """One image and its ground truth.

    Attributes:
        image: (3, H, W) uint8, RGB, at the size that the networks see.
        boxes: (M, 4) float32, XYXY pixels.
        classes: (M,) int64.
    """

    image: Tensor
    boxes: Tensor
    classes: Tensor


class HeadOutputs(NamedTuple):
    """Raw predictions of a batch: (N, L, K), (N, L, 4) in strides, (N, L)."""

    logits: Tensor
    ltrb: Tensor
    quality: Tensor


@dataclasses.dataclass
class Reference:
    """Another library's FCOS behind one face.

    Attributes:
        source: name of the library, as :func:`convert` knows it.
        model: its model.
        head_outputs: what its head gave in the forward pass before.
        detect: from RGB images to detections at the images' size.
        losses: from samples to its three losses (class, box, centerness), each divided by the
            number of positives, floor 1.
        predictors: its last layers (class, box, centerness).
    """

    source: str
    model: nn.Module
    head_outputs: Callable[[], HeadOutputs]
    detect: Callable[[list[Tensor]], list[Instances]]
    losses: Callable[[list[Sample]], list[Tensor]]
    predictors: list[nn.Module]


def build_reference(converted: Converted) -> Reference:
    """Build the model of the library that the weights are from, with these weights.

    Raises:
        ValueError: of a library that can't be run beside ours.
        ImportError: Detectron2's own FCOS is asked for, but this version has none.
    """
    builders = {"torchvision": _torchvision_reference, "detectron2": _detectron2_reference}
    if converted.source not in builders:
        raise ValueError(
            f"{converted.source} can't be run here: parity is measured against "
            f"{' and '.join(builders)}."
        )
    return builders[converted.source](converted)


def random_weights(source: str, num_classes: int, seed: int = 0) -> dict[str, Tensor]:
    """Weights of the library's own ResNet-50 FCOS that detect hundreds of boxes of all scores.

    Random, with batch-norm statistics that are not 0 and 1.
    """
    builders = {"torchvision": _build_torchvision, "detectron2": _build_detectron2}
    generator = torch.Generator().manual_seed(seed)

    def uniform(x: Tensor, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(x.shape, generator=generator)

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        state = builders[source](num_classes).state_dict()
    for name, x in state.items():
        prefix, _, kind = name.rpartition(".")
        if f"{prefix}.running_mean" in state:  # a batch norm
            low, high = {"weight": (0.5, 1.0), "running_var": (0.5, 1.5)}.get(kind, (-0.2, 0.2))
            if kind != "num_batches_tracked":
                state[name] = uniform(x, low, high)
        elif prefix.endswith(("cls_logits", "cls_score")):
            state[name] = 4 * x if kind == "weight" else uniform(x, -4.0, -2.0)
        elif prefix.endswith(("bbox_reg", "bbox_pred")):
            state[name] = 2 * x if kind == "weight" else uniform(x, 0.5, 2.0)
    return state


def training_input(sample: Sample, input_format: str) -> dict:
    instances = Instances(tuple(sample.image.shape[1:]))
    instances.gt_boxes = Boxes(sample.boxes)
    instances.gt_classes = sample.classes
    image = sample.image.flip(0) if input_format == "BGR" else sample.image
    return {"image": image, "instances": instances}


def record_head(
    head: nn.Module, read: Callable[[object], HeadOutputs]
) -> Callable[[], HeadOutputs]:
    """Return a function that gives what the head put out in the last forward pass."""
    outputs: list[HeadOutputs] = []

    def keep(module: nn.Module, inputs: object, output: object) -> None:
        # Copies: Detectron2's FCOS goes on to change its logits in place.
        outputs[:] = [HeadOutputs(*(x.detach().clone() for x in read(output)))]

    head.register_forward_hook(keep)
    return lambda: outputs[0]


def _build_torchvision(num_classes: int) -> nn.Module:
    # Images are compared at the size that the network sees: no resizing.
    return fcos_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=num_classes, _skip_resize=True
    )


def _torchvision_reference(converted: Converted) -> Reference:
    classes = torch.tensor(converted.class_indices)
    model = _build_torchvision(converted.num_outputs)
    model.load_state_dict(converted.original)

    def read(output: Mapping[str, Tensor]) -> HeadOutputs:
        return HeadOutputs(
            output["cls_logits"][..., classes],
            output["bbox_regression"],
            output["bbox_ctrness"].squeeze(2),
        )

    def detect(images: list[Tensor]) -> list[Instances]:
        model.eval()
        model.transform.train()  # in evaluation it would resize all the same
        results = model([x / 255 for x in images])
        return [
            Instances(
                tuple(image.shape[1:]),
                pred_boxes=Boxes(x["boxes"]),
                scores=x["scores"],
                # Slots that stand for no class never detect; see Converted.
                pred_classes=torch.searchsorted(classes, x["labels"]),
            )
            for image, x in zip(images, results, strict=True)
        ]

    def losses(samples: list[Sample]) -> list[Tensor]:
        targets = [{"boxes": x.boxes, "labels": classes[x.classes]} for x in samples]
        result = model([x.image / 255 for x in samples], targets)
        return [result[k] for k in ("classification", "bbox_regression", "bbox_ctrness")]

    head = model.head
    regression = head.regression_head
    predictors = [
        head.classification_head.cls_logits,
        regression.bbox_reg,
        regression.bbox_ctrness,
    ]
    recorded = record_head(head, read)
    return Reference("torchvision", model.eval(), recorded, detect, losses, predictors)


def _build_detectron2(num_classes: int, depth: int = 50) -> nn.Module:
    # Not in every version; the caller is told by ImportError.
    from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead

    names = ["p3", "p4", "p5", "p6", "p7"]
    bottom_up = ResNet(
        stem=BasicStem(norm="FrozenBN"),
        stages=ResNet.make_default_stages(depth, stride_in_1x1=True, norm="FrozenBN"),
        out_features=["res3", "res4", "res5"],
    )
    return FCOS(
        backbone=FPN(
            bottom_up, ["res3", "res4", "res5"], 256, top_block=LastLevelP6P7(256, 256, "p5")
        ),
        head=FCOSHead(
            input_shape=[ShapeSpec(channels=256)] * len(names),
            num_classes=num_classes,
            conv_dims=[256] * 4,
            norm="GN",
        ),
        head_in_features=names,
        num_classes=num_classes,
        pixel_mean=[103.53, 116.28, 123.675],
        pixel_std=[1.0, 1.0, 1.0],
    )


def _detectron2_reference(converted: Converted) -> Reference:
    model = _build_detectron2(converted.num_outputs, converted.cfg["MODEL.RESNETS.DEPTH"])
    model.load_state_dict(converted.original)

    def flatten(maps: list[Tensor]) -> Tensor:
        return torch.cat([x.flatten(2) for x in maps], dim=2).transpose(1, 2)

    def read(output: tuple[list[Tensor], ...]) -> HeadOutputs:
        logits, ltrb, quality = map(flatten, output)
        return HeadOutputs(logits, ltrb.relu(), quality.squeeze(2))

    def detect(images: list[Tensor]) -> list[Instances]:
        return [x["instances"] for x in model.eval()([{"image": x.flip(0)} for x in images])]

    def losses(samples: list[Sample]) -> list[Tensor]:
        with EventStorage() as storage:
            result = model([training_input(x, "BGR") for x in samples])
            num_pos = storage.latest()["num_pos_anchors"][0] * len(samples)
        # It divides by a moving average of the positives.
        factor = model.loss_normalizer / max(num_pos, 1)
        return [result[f"loss_fcos_{name}"] * factor for name in ("cls", "loc", "ctr")]

    predictors = [model.head.cls_score, model.head.bbox_pred, model.head.ctrness]
    recorded = record_head(model.head, read)
    return Reference("detectron2", model.eval(), recorded, detect, losses, predictors)
