"""State dicts of the four libraries, by their own names and shapes.

Each tensor is full of a number of its own, which shows where a tensor of ours is from. They take no
memory: the number is stored once.
"""

import logging
import re

import pytest
import torch
import torchvision
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone.fpn import build_resnet_fpn_backbone
from torchvision.models.detection import FCOS
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from fcos_d2.checkpoint.keys import is_setting


def mark(shapes):
    """Tensors of the given shapes, the k-th full of k."""
    return {
        name: torch.tensor(float(k)).expand(tuple(shape)) for k, (name, shape) in enumerate(shapes)
    }


def shapes_of(module, prefix=""):
    return [(prefix + name, x.shape) for name, x in module.state_dict().items()]


def conv(name, out, channels, size=3):
    return [(f"{name}.weight", (out, channels, size, size)), (f"{name}.bias", (out,))]


def norm(name, channels):
    return [(f"{name}.weight", (channels,)), (f"{name}.bias", (channels,))]


def batch_norm(name, channels, affine=True):
    shapes = norm(name, channels) if affine else []
    shapes += [(f"{name}.running_mean", (channels,)), (f"{name}.running_var", (channels,))]
    return [*shapes, (f"{name}.num_batches_tracked", ())]


def tower(name, num_convs, channels, kind, levels):
    """A torch Sequential of convolution, norm, ReLU; ``kind`` is "GN", "BN", "cycle" or ""."""
    shapes = []
    for k in range(num_convs):
        place = k * (3 if kind else 2)
        shapes += conv(f"{name}.{place}", channels, channels)
        if kind == "GN":
            shapes += norm(f"{name}.{place + 1}", channels)
        elif kind == "BN":  # a list of norms
            for level in range(levels):
                shapes += batch_norm(f"{name}.{place + 1}.{level}", channels)
        elif kind == "cycle":  # Detectron2's CycleBatchNormList
            shapes += norm(f"{name}.{place + 1}", channels)
            for level in range(levels):
                shapes += batch_norm(f"{name}.{place + 1}.{level}", channels, affine=False)
    return shapes


def detectron2_backbone(depth=18, channels=64, top=(64, 64), resnet_norm="FrozenBN", groups=1):
    """Detectron2's own ResNet-FPN of p3..p5 and, for each of ``top``, P6 and P7 from so many."""
    cfg = get_cfg()
    cfg.MODEL.RESNETS.DEPTH = depth
    cfg.MODEL.RESNETS.NUM_GROUPS = groups
    cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 64 if groups == 1 else 4
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64 if depth < 50 else 256
    cfg.MODEL.RESNETS.NORM = resnet_norm
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.FPN.OUT_CHANNELS = channels
    with torch.device("meta"):
        shapes = shapes_of(build_resnet_fpn_backbone(cfg, ShapeSpec(channels=3)), "backbone.")
    for level, source in zip((6, 7), top, strict=False):
        shapes += conv(f"backbone.top_block.p{level}", channels, source)
    return shapes


def torchvision_state(depth=18, num_classes=4, layers=(2, 3, 4), norm_layer=torch.nn.BatchNorm2d):
    with torch.device("meta"):
        backbone = resnet_fpn_backbone(
            backbone_name=f"resnet{depth}",
            weights=None,
            norm_layer=norm_layer,
            returned_layers=list(layers),
            extra_blocks=LastLevelP6P7(256, 256),
        )
        model = FCOS(backbone, num_classes)
    return mark(shapes_of(model))


def _detectron2_state(depth=18, num_classes=3, channels=64, kind="GN", num_convs=2, **backbone):
    shapes = detectron2_backbone(depth, channels, **backbone)
    shapes += tower("head.cls_subnet", num_convs, channels, kind, 5)
    shapes += tower("head.bbox_subnet", num_convs, channels, kind, 5)
    shapes += conv("head.cls_score", num_classes, channels)
    shapes += conv("head.bbox_pred", 4, channels) + conv("head.ctrness", 1, channels)
    return mark(shapes)


def _adelaidet_state(
    depth=18,
    num_classes=3,
    channels=64,
    kind="GN",
    convs=(0, 2, 2),
    levels=5,
    has_scales=True,
    **backbone,
):
    backbone.setdefault("top", (channels, channels)[: levels - 3])
    shapes = detectron2_backbone(depth, channels, **backbone)
    head = "proposal_generator.fcos_head"
    for name, num_convs in zip(("share", "cls", "bbox"), convs, strict=True):
        shapes += tower(f"{head}.{name}_tower", num_convs, channels, kind, levels)
    shapes += conv(f"{head}.cls_logits", num_classes, channels)
    shapes += conv(f"{head}.bbox_pred", 4, channels) + conv(f"{head}.ctrness", 1, channels)
    shapes += [(f"{head}.scales.{level}.scale", (1,)) for level in range(levels * has_scales)]
    return mark(shapes)


def _mmdet_state(
    depth=18, num_classes=3, channels=64, kind="gn", bias=False, num_convs=2, top_channels=None
):
    with torch.device("meta"):
        resnet = shapes_of(getattr(torchvision.models, f"resnet{depth}")(), "backbone.")
    shapes = [(name, shape) for name, shape in resnet if ".fc." not in name]
    stages = (128, 256, 512) if depth < 50 else (512, 1024, 2048)
    for k, stage in enumerate(stages):
        shapes += conv(f"neck.lateral_convs.{k}.conv", channels, stage, 1)
        shapes += conv(f"neck.fpn_convs.{k}.conv", channels, channels)
    shapes += conv("neck.fpn_convs.3.conv", channels, top_channels or channels)
    shapes += conv("neck.fpn_convs.4.conv", channels, channels)
    for name in ("cls_convs", "reg_convs"):
        for k in range(num_convs):
            part = conv(f"bbox_head.{name}.{k}.conv", channels, channels)
            shapes += part if bias or not kind else part[:1]
            if kind:
                layer = norm if kind == "gn" else batch_norm
                shapes += layer(f"bbox_head.{name}.{k}.{kind}", channels)
    shapes += conv("bbox_head.conv_cls", num_classes, channels)
    shapes += conv("bbox_head.conv_reg", 4, channels)
    shapes += conv("bbox_head.conv_centerness", 1, channels)
    shapes += [(f"bbox_head.scales.{level}.scale", ()) for level in range(5)]
    return mark(shapes)


_STATES = {
    "torchvision": torchvision_state,
    "detectron2": _detectron2_state,
    "adelaidet": _adelaidet_state,
    "mmdet": _mmdet_state,
}


@pytest.fixture
def info_log(caplog):
    """caplog with the INFO messages of the package."""
    with caplog.at_level(logging.INFO, logger="fcos_d2"):
        yield caplog


@pytest.fixture
def make_state():
    """A state dict: ``make_state(library, **what_differs)``; by default a ResNet-18."""
    return lambda library, **kwargs: _STATES[library](**kwargs)


RESNET = [
    (r"conv1\.", "stem.conv1."),
    (r"bn1\.", "stem.conv1.norm."),
    (r"layer(\d)\.(\d+)\.conv(\d)\.", r"res\1.\2.conv\3."),
    (r"layer(\d)\.(\d+)\.bn(\d)\.", r"res\1.\2.conv\3.norm."),
    (r"layer(\d)\.(\d+)\.downsample\.0\.", r"res\1.\2.shortcut."),
    (r"layer(\d)\.(\d+)\.downsample\.1\.", r"res\1.\2.shortcut.norm."),
]


def translate_resnet(name):
    """Our name of a tensor of torchvision's ResNet, from a table in the other direction."""
    (ours,) = (re.sub(f"^{k}", v, name) for k, v in RESNET if re.match(k, name))
    ours = re.sub(r"^res(\d)", lambda match: f"res{int(match[1]) + 1}", ours)
    return f"backbone.bottom_up.{ours}"


@pytest.fixture
def assert_landed():
    """Check where each tensor went: ``assert_landed(converted, state, translate)``.

    ``translate`` gives our names for one of theirs: a string, several, or none (no weight). All
    of our tensors but ``filled`` ones have to come from there.
    """

    def check(converted, state, translate, filled=()):
        expected = {}
        for name, value in state.items():
            ours = translate(name)
            for one in [ours] if isinstance(ours, str) else ours:
                assert one not in expected, f"{one} has two sources"
                expected[one] = value
        weights = {name for name in converted.weights if not is_setting(name)}
        assert weights == expected.keys() | set(filled)
        for name, value in expected.items():
            got = converted.weights[name]
            assert got.numel() == value.numel() and (got == value.flatten()[0]).all(), name
        for name in filled:
            assert not converted.weights[name].any()

    return check
