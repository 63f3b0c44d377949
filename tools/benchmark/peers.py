"""fcos_d2 and the other FCOS implementations behind one face, with the same weights."""

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, build_model
from detectron2.modeling.backbone import FPN, BasicStem, ResNet
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from torchvision.models.detection import FCOS as TorchvisionFCOS
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.fcos import FCOSClassificationHead, FCOSRegressionHead
from torchvision.models.detection.image_list import ImageList as TorchvisionImageList
from torchvision.ops.feature_pyramid_network import LastLevelP6P7 as TorchvisionP6P7

from fcos_d2.checkpoint.architecture import build_cfg
from fcos_d2.checkpoint.convert import convert
from fcos_d2.checkpoint.libraries import LIBRARIES
from fcos_d2.modeling import compute_locations
from fcos_d2.modeling.proposal_generator import Predictions
from references import Sample

NUM_CLASSES = 20
STRIDES = (8, 16, 32, 64, 128)
OURS = "fcos_d2"
# ImageNet's statistics of RGB images in 0..255, in every model.
_PIXEL_MEAN = [123.675, 116.28, 103.53]
_PIXEL_STD = [58.395, 57.12, 57.375]
_SCORE_THRESH = 0.2
# The grid of all but torchvision, which has locations at multiples of the step.
_CENTERED = {
    "MODEL.FCOS.LOCATION_OFFSET": 0.5,
    "MODEL.FCOS.LOCATION_STEP": "stride",
    "MODEL.FCOS.CLIP_BEFORE_NMS": False,
}


class Maps(NamedTuple):
    """What the last convolutions give, one map a level.

    Attributes:
        logits: (N, K, H_l, W_l).
        ltrb: (N, 4, H_l, W_l), in strides, before the ReLU.
        quality: (N, 1, H_l, W_l).
    """

    logits: list[Tensor]
    ltrb: list[Tensor]
    quality: list[Tensor]


@dataclasses.dataclass
class Peer:
    """One FCOS implementation; ``Any`` is its own form of the thing.

    Attributes:
        name: of the library.
        model: its model.
        twin: fcos_d2's with the same weights and the same rules; None in fcos_d2's own.
        network: its backbone and head, to be compiled.
        predictor: its last layer for the classes.
        targets: samples to its ground truth.
        images: images (3, H, W) uint8, RGB, to the input of ``detect``.
        detect: the whole model, from images to detections.
        training_inputs: samples to the input of ``train``.
        train: the whole model, from samples to its loss.
        grid: (maps, padded image size) to its locations or anchors.
        match: (grid, targets) to what its losses need of the ground truth.
        labels: (matches, targets) to labels (N, L), K for background.
        loss: (grid, maps, matches, targets) to its loss.
        head_outputs: maps to what its head gives.
        decode: (grid, head outputs, image sizes) to detections.
    """

    name: str
    model: nn.Module
    twin: "Peer | None"
    network: list[nn.Module]
    predictor: nn.Conv2d
    targets: Callable[[Sequence[Sample]], Any]
    images: Callable[[Sequence[Tensor]], Any]
    detect: Callable[[Any], Any]
    training_inputs: Callable[[Sequence[Sample]], Any]
    train: Callable[[Any], Tensor]
    grid: Callable[[Maps, tuple[int, int]], Any]
    match: Callable[[Any, Any], Any]
    labels: Callable[[Any, Any], Tensor]
    loss: Callable[[Any, Maps, Any, Any], Tensor]
    head_outputs: Callable[[Maps], Any]
    decode: Callable[[Any, Any, Sequence[tuple[int, int]]], Any]

    def set_training(self, training: bool) -> None:
        """Switch the model; torchvision's would resize images in evaluation."""
        self.model.train(training)
        if hasattr(self.model, "transform"):
            self.model.transform.train()


def build_peers(names: Sequence[str], depth: int, device: str) -> list[Peer]:
    """Build fcos_d2, first, and the peers of these names, all with the same random weights.

    Args:
        names: of "torchvision", "detectron2" and "adelaidet".
        depth: of the ResNet, 18 or 50.
        device: where the models live.

    Raises:
        ImportError: a peer is not installed, see :func:`why_missing`.
    """
    theirs = _build_torchvision(depth)
    state = random_weights(theirs.state_dict())
    theirs.load_state_dict(state)
    ours, centered = (_ours(state, keys).to(device) for keys in ({}, _CENTERED))
    one, other = ours_peer(ours), ours_peer(centered)
    peers = [one]
    for name in names:
        if name == "torchvision":
            peers.append(_torchvision_peer(theirs.to(device), one))
        else:
            build, adapt = {
                "detectron2": (_build_detectron2, _detectron2_peer),
                "adelaidet": (_build_adelaidet, _adelaidet_peer),
            }[name]
            model = build(depth)
            _load(model, LIBRARIES[name], centered.state_dict())
            peers.append(adapt(model.to(device), other))
    return peers


@torch.no_grad()
def set_candidates(peers: Sequence[Peer], images: Sequence[Tensor], count: int = 900) -> None:
    """Shift the class bias of all peers so that an image has ``count`` candidates.

    Candidates are pairs of location and class with a score above the threshold. Random weights
    give tens of thousands, which no trained model does.
    """
    ours, outputs = peers[0], []
    hook = ours.model.proposal_generator.head.register_forward_hook(
        lambda head, inputs, output: outputs.append(output)
    )
    ours.set_training(False)
    ours.detect(ours.images(images))
    hook.remove()
    logits, _, quality = outputs[0]
    # What each logit lacks to reach the threshold.
    lacking = (_SCORE_THRESH**2 / quality.sigmoid()).logit()[..., None] - logits
    lacking = lacking.nan_to_num(torch.inf).flatten()  # the quality alone is below it
    shift = lacking.kthvalue(min(count * len(images), len(lacking))).values
    models = [x for peer in peers for x in (peer, peer.twin) if x is not None]
    for bias in {id(x.predictor): x.predictor.bias for x in models}.values():
        bias += shift


def why_missing(name: str) -> str:
    """Why a peer can't be built and how to get it; empty if it can."""
    try:
        if name == "detectron2":
            import detectron2.modeling.meta_arch.fcos  # noqa: F401
        elif name == "adelaidet":
            _import_adelaidet()
    except ImportError as error:
        return f"{_HOW_TO_GET[name]} ({error})"
    return ""


_HOW_TO_GET = {
    "detectron2": "this version of Detectron2 has no FCOS of its own: install its main branch",
    "adelaidet": "AdelaiDet is not installed: install it from its repository, aim-uofa/AdelaiDet",
}


def random_weights(state: Mapping[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """Weights for torchvision's FCOS that detect boxes of all scores in noise."""
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for name, x in state.items():
        prefix, _, kind = name.rpartition(".")
        noise = torch.rand(x.shape, generator=generator)
        if f"{prefix}.running_mean" in state:  # a batch norm
            low, high = {"weight": (0.5, 1.0), "running_var": (0.5, 1.5)}.get(kind, (-0.2, 0.2))
        elif x.dim() == 4:
            high = (4.5 / x[0].numel()) ** 0.5  # keeps the variance behind a ReLU, and a bit less
            high *= {"cls_logits": 2, "bbox_reg": 0.5}.get(prefix.rpartition(".")[2], 1)
            low = -high
        elif prefix.endswith("cls_logits"):
            low, high = -4.0, -2.0
        elif prefix.endswith("bbox_reg"):
            low, high = 1.0, 3.0
        else:
            low, high = (0.5, 1.0) if kind == "weight" else (-0.2, 0.2)
        result[name] = low + (high - low) * noise
    return result


def as_instances(result: Any) -> list[Instances]:
    """Detections of any peer as Detectron2's."""
    return [_one_as_instances(x) for x in result]


def _one_as_instances(x: Any) -> Instances:
    if isinstance(x, Instances):
        return x
    if "instances" in x:
        return x["instances"]
    fields = {"pred_boxes": Boxes(x["boxes"]), "pred_classes": x["labels"]}
    return Instances((0, 0), scores=x["scores"], **fields)


def _gt_instances(samples: Sequence[Sample]) -> list[Instances]:
    return [
        Instances(tuple(x.image.shape[1:]), gt_boxes=Boxes(x.boxes), gt_classes=x.classes)
        for x in samples
    ]


def _detectron2_images(images: Sequence[Tensor]) -> list[dict]:
    return [{"image": x} for x in images]


def _detectron2_inputs(samples: Sequence[Sample]) -> list[dict]:
    pairs = zip(samples, _gt_instances(samples), strict=True)
    return [{"image": x.image, "instances": instances} for x, instances in pairs]


def _train_detectron2(model: nn.Module) -> Callable[[list[dict]], Tensor]:
    def train(inputs: list[dict]) -> Tensor:
        with EventStorage():
            return sum(model(inputs).values())

    return train


# fcos_d2


def _ours(state: Mapping[str, Tensor], keys: Mapping[str, Any]) -> nn.Module:
    converted = convert(state, "torchvision", overrides=keys)
    cfg = build_cfg(converted.cfg, NUM_CLASSES)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.FCOS.SCORE_THRESH_TEST = _SCORE_THRESH
    model = build_model(cfg)
    model.load_state_dict(converted.weights, strict=False)
    return model


class _Same(nn.Module):
    def forward(self, x: Any, level: int) -> Any:
        return x


class _Pick(nn.Module):
    def __init__(self, index: int):
        super().__init__()
        self.index = index

    def forward(self, x: Sequence[Tensor]) -> Tensor:
        return x[self.index]


def _without_convolutions(head: nn.Module) -> nn.Module:
    """Return what our head does to the outputs of its convolutions, a triple of maps a level."""
    head = copy.deepcopy(head)
    for name in ("share_tower", "cls_tower", "box_tower"):
        setattr(head, name, _Same())
    for index, name in enumerate(("cls_score", "box_pred", "centerness")):
        setattr(head, name, _Pick(index))
    return head


def ours_peer(model: nn.Module) -> Peer:
    """fcos_d2's model behind the face."""
    generator = model.proposal_generator
    bare_head = _without_convolutions(generator.head)

    def head_outputs(maps: Maps) -> tuple[Tensor, Tensor, Tensor]:
        return bare_head(list(zip(*maps, strict=True)))

    def grid(maps: Maps, size: tuple[int, int]) -> Any:
        return compute_locations(
            [x.shape[-2:] for x in maps.logits],
            generator.strides,
            generator.location_offset,
            maps.logits[0].device,
            image_size=size if generator.location_step == "image" else None,
        )

    def loss(grid: Any, maps: Maps, matches: Any, targets: Any) -> Tensor:
        with EventStorage():
            predictions = Predictions(grid, *head_outputs(maps))
            return sum(generator.matched_losses(predictions, matches).values())

    return Peer(
        name=OURS,
        model=model,
        twin=None,
        network=[model.backbone, generator.head],
        predictor=generator.head.cls_score,
        targets=_gt_instances,
        images=_detectron2_images,
        detect=model,
        training_inputs=_detectron2_inputs,
        train=_train_detectron2(model),
        grid=grid,
        match=generator.matcher,
        labels=lambda matches, targets: matches.labels,
        loss=loss,
        head_outputs=head_outputs,
        decode=lambda grid, outputs, sizes: generator.detect(Predictions(grid, *outputs), sizes),
    )


# torchvision


def _build_torchvision(depth: int) -> nn.Module:
    # Batch norms and the first two stages are frozen, as in all of them.
    backbone = resnet_fpn_backbone(
        backbone_name=f"resnet{depth}",
        weights=None,
        trainable_layers=3,
        returned_layers=[2, 3, 4],
        extra_blocks=TorchvisionP6P7(256, 256),
    )
    return TorchvisionFCOS(
        backbone, NUM_CLASSES, score_thresh=_SCORE_THRESH, nms_thresh=0.6, _skip_resize=True
    )


def _torchvision_targets(samples: Sequence[Sample]) -> list[dict[str, Tensor]]:
    return [{"boxes": x.boxes, "labels": x.classes} for x in samples]


def _torchvision_match(model: nn.Module, grid: Any, targets: Any) -> list[Tensor]:
    """Run the first half of ``compute_loss``: a head that returns what it is given stands in."""
    head = SimpleNamespace(compute_loss=lambda targets, outputs, anchors, matched: matched)
    first_half = SimpleNamespace(center_sampling_radius=model.center_sampling_radius, head=head)
    anchors, lengths = grid
    with torch.no_grad():
        return TorchvisionFCOS.compute_loss(first_half, targets, None, anchors, lengths)


def _torchvision_outputs(maps: Maps) -> dict[str, Tensor]:
    """Run what its head does to the outputs of its convolutions."""

    def same(x: Any) -> Any:
        return x

    cls_head = SimpleNamespace(conv=same, cls_logits=same, num_classes=NUM_CLASSES)
    box_head = SimpleNamespace(conv=same, bbox_reg=lambda x: x[0], bbox_ctrness=lambda x: x[1])
    logits = FCOSClassificationHead.forward(cls_head, maps.logits)
    pairs = list(zip(maps.ltrb, maps.quality, strict=True))
    ltrb, quality = FCOSRegressionHead.forward(box_head, pairs)
    return {"cls_logits": logits, "bbox_regression": ltrb, "bbox_ctrness": quality}


def _torchvision_peer(model: nn.Module, twin: Peer) -> Peer:
    def grid(maps: Maps, size: tuple[int, int]) -> tuple[list[Tensor], list[int]]:
        num_images = len(maps.logits[0])
        images = maps.logits[0].new_empty(1).expand(num_images, 3, *size)
        anchors = model.anchor_generator(
            TorchvisionImageList(images, [size] * num_images), maps.logits
        )
        return anchors, [x.shape[2] * x.shape[3] for x in maps.logits]

    def labels(matches: Any, targets: Any) -> Tensor:
        return torch.stack(
            [
                torch.cat((x["labels"], x["labels"].new_full((1,), NUM_CLASSES)))[matched]
                for matched, x in zip(matches, targets, strict=True)
            ]
        )

    def loss(grid: Any, maps: Maps, matches: Any, targets: Any) -> Tensor:
        outputs = _torchvision_outputs(maps)
        return sum(model.head.compute_loss(targets, outputs, grid[0], matches).values())

    def decode(grid: Any, outputs: Any, sizes: Sequence[tuple[int, int]]) -> Any:
        anchors, lengths = grid
        split = {name: list(x.split(lengths, dim=1)) for name, x in outputs.items()}
        anchors = [list(x.split(lengths)) for x in anchors]
        return model.postprocess_detections(split, anchors, sizes)

    return Peer(
        name="torchvision",
        model=model,
        twin=twin,
        network=[model.backbone, model.head],
        predictor=model.head.classification_head.cls_logits,
        targets=_torchvision_targets,
        images=lambda images: [x / 255 for x in images],
        detect=model,
        training_inputs=lambda xs: ([x.image / 255 for x in xs], _torchvision_targets(xs)),
        train=lambda inputs: sum(model(*inputs).values()),
        grid=grid,
        match=lambda grid, targets: _torchvision_match(model, grid, targets),
        labels=labels,
        loss=loss,
        head_outputs=_torchvision_outputs,
        decode=decode,
    )


# Detectron2 and AdelaiDet


def _detectron2_backbone(depth: int) -> FPN:
    # The stride is where torchvision and fcos_d2 have it here: the same convolutions.
    keys = {} if depth < 50 else {"stride_in_1x1": False}
    bottom_up = ResNet(
        BasicStem(norm="FrozenBN"),
        ResNet.make_default_stages(depth, norm="FrozenBN", **keys),
        out_features=["res3", "res4", "res5"],
        freeze_at=2,
    )
    in_features = ["res3", "res4", "res5"]
    return FPN(bottom_up, in_features, 256, top_block=LastLevelP6P7(256, 256, "p5"))


def _load(model: nn.Module, library: Any, ours: Mapping[str, Tensor]) -> None:
    """Load our weights into their model."""
    state = model.state_dict()
    renamed = {library.rename(name, state): x for name, x in ours.items()}
    missing = set(state) - set(renamed)
    if any("anchor_generator" not in name for name in missing):
        raise RuntimeError(f"no weights for {sorted(missing)}")
    model.load_state_dict(renamed, strict=False)


def _build_detectron2(depth: int) -> nn.Module:
    from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead

    names = ["p3", "p4", "p5", "p6", "p7"]
    head = FCOSHead(
        input_shape=[ShapeSpec(channels=256)] * len(names),
        num_classes=NUM_CLASSES,
        conv_dims=[256] * 4,
        norm="GN",
    )
    return FCOS(
        backbone=_detectron2_backbone(depth),
        head=head,
        head_in_features=names,
        num_classes=NUM_CLASSES,
        test_score_thresh=_SCORE_THRESH,
        pixel_mean=_PIXEL_MEAN,
        pixel_std=_PIXEL_STD,
    )


def _detectron2_peer(model: nn.Module, twin: Peer) -> Peer:
    def loss(grid: Any, maps: Maps, matches: Any, targets: Any) -> Tensor:
        predictions = model._transpose_dense_predictions(list(maps), [NUM_CLASSES, 4, 1])
        logits, deltas, quality = predictions
        labels, boxes = matches
        with EventStorage():
            losses = model.losses(grid, logits, list(labels), deltas, boxes, quality)
        return sum(losses.values())

    def decode(grid: Any, outputs: Any, sizes: Sequence[tuple[int, int]]) -> list[Instances]:
        # Its method would make the grid anew.
        without_grid = SimpleNamespace(
            num_classes=NUM_CLASSES,
            anchor_generator=lambda features: grid,
            _transpose_dense_predictions=model._transpose_dense_predictions,
            inference_single_image=model.inference_single_image,
        )
        images = ImageList(torch.empty(0), list(sizes))
        return type(model).forward_inference(without_grid, images, None, outputs)

    return Peer(
        name="detectron2",
        model=model,
        twin=twin,
        network=[model.backbone, model.head],
        predictor=model.head.cls_score,
        targets=_gt_instances,
        images=_detectron2_images,
        detect=model,
        training_inputs=_detectron2_inputs,
        train=_train_detectron2(model),
        grid=lambda maps, size: model.anchor_generator(maps.logits),
        match=model.label_anchors,
        labels=lambda matches, targets: torch.stack(matches[0]),
        loss=loss,
        head_outputs=list,
        decode=decode,
    )


@contextlib.contextmanager
def _without_our_backbone() -> Iterator[None]:
    """Let AdelaiDet register its backbone, which has the name of ours."""
    name = "build_fcos_resnet_fpn_backbone"
    ours = BACKBONE_REGISTRY._obj_map.pop(name)
    try:
        yield
    finally:
        BACKBONE_REGISTRY._obj_map[name] = ours


def _import_adelaidet() -> SimpleNamespace:
    with _without_our_backbone():
        from adet.config import get_cfg
        from adet.modeling.fcos import FCOS
        from adet.modeling.one_stage_detector import OneStageDetector
    return SimpleNamespace(get_cfg=get_cfg, FCOS=FCOS, OneStageDetector=OneStageDetector)


def _build_adelaidet(depth: int) -> nn.Module:
    adet = _import_adelaidet()
    cfg = adet.get_cfg()
    cfg.MODEL.FCOS.NUM_CLASSES = NUM_CLASSES
    cfg.MODEL.FCOS.USE_SCALE = False
    # The threshold of the others is on the root of class times centerness.
    cfg.MODEL.FCOS.THRESH_WITH_CTR = True
    cfg.MODEL.FCOS.INFERENCE_TH_TEST = _SCORE_THRESH**2
    backbone = _detectron2_backbone(depth)
    return adet.OneStageDetector(
        backbone=backbone,
        proposal_generator=adet.FCOS(cfg, backbone.output_shape()),
        pixel_mean=_PIXEL_MEAN,
        pixel_std=_PIXEL_STD,
    )


def _adelaidet_peer(model: nn.Module, twin: Peer) -> Peer:
    generator = model.proposal_generator
    outputs = generator.fcos_outputs

    def head_outputs(maps: Maps) -> Maps:
        return maps._replace(ltrb=[F.relu(x) for x in maps.ltrb])

    def labels(matches: Any, targets: Any) -> Tensor:
        levels = [x.view(len(targets), -1) for x in matches["labels"]]
        return torch.cat(levels, dim=1)

    def loss(grid: Any, maps: Maps, matches: Any, targets: Any) -> Tensor:
        # Its method would match anew.
        matched = SimpleNamespace(
            num_classes=NUM_CLASSES,
            _get_ground_truth=lambda locations, gt_instances: matches,
            fcos_losses=outputs.fcos_losses,
        )
        maps = head_outputs(maps)
        return sum(type(outputs).losses(matched, *maps, grid, targets, [])[1].values())

    def decode(grid: Any, maps: Any, sizes: Sequence[tuple[int, int]]) -> list[Instances]:
        return outputs.predict_proposals(*maps, grid, sizes, [])

    return Peer(
        name="adelaidet",
        model=model,
        twin=twin,
        network=[model.backbone, generator.fcos_head],
        predictor=generator.fcos_head.cls_logits,
        targets=_gt_instances,
        images=_detectron2_images,
        detect=model,
        training_inputs=_detectron2_inputs,
        train=_train_detectron2(model),
        grid=lambda maps, size: generator.compute_locations(maps.logits),
        match=outputs._get_ground_truth,
        labels=labels,
        loss=loss,
        head_outputs=head_outputs,
        decode=decode,
    )
