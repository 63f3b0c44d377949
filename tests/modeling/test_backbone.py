"""The ResNet-FPN builder, and FCOS on it and on Detectron2's other backbones."""

import importlib.machinery
import importlib.util

import pytest
import torch
from detectron2.modeling import FPN, build_backbone, build_model
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from fcos_d2.modeling import (
    FCOS,
    CenterSamplingMatcher,
    FCOSDecoder,
    FCOSHead,
    FCOSProposalGenerator,
)

P3_TO_P7 = ["p3", "p4", "p5", "p6", "p7"]
SIZES = [64, 128, 256, 512]


def with_keys(cfg, keys):
    cfg.merge_from_list([x for pair in keys.items() for x in pair])
    return cfg


def with_stages(*stages):
    return {"MODEL.RESNETS.OUT_FEATURES": list(stages), "MODEL.FPN.IN_FEATURES": list(stages)}


RES4 = with_stages("res3", "res4")
RES2 = with_stages("res2", "res3", "res4", "res5")


# The builder


@pytest.mark.parametrize(
    "stages, in_feature, first, channels",
    [
        ({}, "p5", "p6", 64),
        ({}, "res5", "p6", 512),  # the 64 channels of res2 double with each stage
        # A ResNet that ends with res4: P5 belongs to the top block.
        (RES4, "p4", "p5", 64),
        (RES4, "res4", "p5", 256),
    ],
)
def test_input_of_the_top_block(tiny_cfg, stages, in_feature, first, channels):
    keys = {**stages, "MODEL.FCOS.TOP_BLOCK_IN_FEATURE": in_feature}
    backbone = build_backbone(with_keys(tiny_cfg, keys))
    assert hasattr(backbone.bottom_up, "res5") == (not stages)
    assert getattr(backbone.top_block, first).in_channels == channels
    strides = {name: shape.stride for name, shape in backbone.output_shape().items()}
    assert strides == {"p3": 8, "p4": 16, "p5": 32, "p6": 64, "p7": 128}
    features = backbone(torch.zeros(1, 3, 64, 96))
    shapes = {name: tuple(x.shape) for name, x in features.items()}
    assert shapes["p3"] == (1, 64, 8, 12)
    assert shapes["p5"] == (1, 64, 2, 3)
    assert shapes["p7"] == (1, 64, 1, 1)


@pytest.mark.parametrize("stages, remedy", [({}, "'p5' or 'res5'"), (RES4, "'p4' or 'res4'")])
def test_unknown_input_of_the_top_block(tiny_cfg, stages, remedy):
    keys = {**stages, "MODEL.FCOS.TOP_BLOCK_IN_FEATURE": "res3"}
    with pytest.raises(ValueError, match=f"TOP_BLOCK_IN_FEATURE is 'res3'.* {remedy}"):
        build_backbone(with_keys(tiny_cfg, keys))


def test_p6_and_p7_are_those_of_detectron2(tiny_cfg):
    """Detectron2's LastLevelP6P7 with the same weights is the reference."""
    block = build_backbone(tiny_cfg).top_block
    reference = LastLevelP6P7(64, 64, "p5")
    reference.load_state_dict(block.state_dict())
    x = torch.randn(2, 64, 9, 7, generator=torch.Generator().manual_seed(0))
    for ours, theirs in zip(block(x), reference(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


# Training on every backbone and on 3 to 6 levels


def in_python(backbone, names, sizes_of_interest, strides=None):
    shapes = [backbone.output_shape()[name] for name in names]
    return FCOS(
        backbone=backbone,
        proposal_generator=FCOSProposalGenerator(
            in_features=names,
            strides=strides or [shape.stride for shape in shapes],
            head=FCOSHead(input_shape=shapes, num_classes=3, num_cls_convs=1, num_box_convs=1),
            matcher=CenterSamplingMatcher(
                num_classes=3, radius=1.5, sizes_of_interest=sizes_of_interest
            ),
            decoder=FCOSDecoder(),
        ),
        pixel_mean=[103.53, 116.28, 123.675],
        pixel_std=[57.375, 57.12, 58.395],
    )


def make_batch(device):
    """Boxes of 20, 84 and 120 pixels, which fall on three levels with the usual ranges."""
    batch = []
    for width, boxes in ((128, [[10, 20, 30, 40], [4, 2, 124, 90]]), (96, [[6, 6, 90, 80]])):
        instances = Instances((96, width), gt_boxes=Boxes(torch.tensor(boxes).float()))
        instances.gt_classes = torch.arange(len(boxes))
        image = torch.randint(0, 256, (3, 96, width), dtype=torch.uint8)
        batch.append({"image": image.to(device), "instances": instances.to(device)})
    return batch


def check_training(model):
    """One step of SGD: every parameter has a gradient, which is not 0 in the FPN and the head."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with EventStorage() as storage:
        losses = model.train()(make_batch(model.device))
        assert storage.latest()["fcos/num_pos"][0] > 0
    assert set(losses) == {"loss_cls", "loss_box", "loss_ctr"}
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        if "bottom_up" not in name and name.endswith("weight"):
            assert parameter.grad.any(), name
    optimizer.step()


def check_detection(model):
    model.proposal_generator.decoder.score_thresh = 0.0
    with torch.no_grad():
        outputs = model.eval()(make_batch(model.device))
    assert all(len(x["instances"]) for x in outputs)


def resnet(depth, **options):
    keys = {f"MODEL.RESNETS.{key}": value for key, value in options.items()}
    return {"MODEL.RESNETS.DEPTH": depth, "MODEL.RESNETS.RES2_OUT_CHANNELS": 256, **keys}


def levels(*names, sizes):
    keys = {"MODEL.FCOS.IN_FEATURES": list(names), "MODEL.FCOS.SIZES_OF_INTEREST": sizes}
    return {**keys, "MODEL.FCOS.USE_SCALE": True}  # one parameter per level


P2_TO_P6 = levels("p2", "p3", "p4", "p5", "p6", sizes=[32, 64, 128, 256])
# Name: what differs from tiny_cfg's ResNet-18 with P3 to P7.
MODELS = {
    "ResNet-18": {},
    "ResNet-50": resnet(50),
    "ResNet-101": resnet(101),
    "ResNeXt-50 32x4d": resnet(50, NUM_GROUPS=32, WIDTH_PER_GROUP=4),
    "Detectron2's FPN, P6 by pooling": {
        "MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone",
        **RES2,
        **P2_TO_P6,
    },
    "RetinaNet's FPN, P6 from C5": {"MODEL.BACKBONE.NAME": "build_retinanet_resnet_fpn_backbone"},
    "3 levels": levels("p3", "p4", "p5", sizes=[64, 128]),
    "4 levels": levels("p3", "p4", "p5", "p6", sizes=[64, 128, 256]),
    "5 levels": levels(*P3_TO_P7, sizes=SIZES),
    "6 levels": {**RES2, **levels("p2", *P3_TO_P7, sizes=[32, *SIZES])},
}


@pytest.mark.parametrize("name", MODELS)
def test_training_and_detection(tiny_cfg, name):
    cfg = with_keys(tiny_cfg, MODELS[name])
    model = build_model(cfg)
    assert model.proposal_generator.strides == [2 ** int(x[1]) for x in cfg.MODEL.FCOS.IN_FEATURES]
    check_training(model)
    check_detection(model)


def test_regnet():
    """Built in Python: Detectron2 has no yaml key for it. The stride of stage s2 is 8."""
    regnet = pytest.importorskip("detectron2.modeling.backbone.regnet", reason="older Detectron2")
    bottom_up = regnet.RegNet(
        stem_class=regnet.SimpleStem,
        stem_width=32,
        block_class=regnet.ResBottleneckBlock,
        depth=13,
        w_a=27.89,
        w_0=48,
        w_m=2.09,
        group_width=8,
        norm="BN",
        out_features=["s2", "s3", "s4"],
    )
    backbone = FPN(bottom_up, ["s2", "s3", "s4"], 64, top_block=LastLevelP6P7(64, 64, "p5"))
    model = in_python(backbone, P3_TO_P7, SIZES)
    assert model.proposal_generator.strides == [8, 16, 32, 64, 128]
    check_training(model)
    check_detection(model)


DEFORMABLE = resnet(50, DEFORM_ON_PER_STAGE=[False, True, True, True])


def test_deformable_resnet_detects(tiny_cfg):
    """On the CPU Detectron2 uses torchvision's operator, which it cannot train."""
    check_detection(build_model(with_keys(tiny_cfg, DEFORMABLE)))


def has_compiled_operators():
    spec = importlib.util.find_spec("detectron2._C")
    return spec is not None and spec.origin.endswith(tuple(importlib.machinery.EXTENSION_SUFFIXES))


@pytest.mark.skipif(
    not (torch.cuda.is_available() and has_compiled_operators()),
    reason="needs CUDA and Detectron2's compiled operators",
)
@pytest.mark.parametrize("modulated", [False, True])
def test_deformable_resnet_trains(tiny_cfg, modulated):
    keys = {"MODEL.RESNETS.DEFORM_MODULATED": modulated, "MODEL.DEVICE": "cuda"}
    model = build_model(with_keys(tiny_cfg, {**DEFORMABLE, **keys}))
    check_training(model)
    check_detection(model)


# Levels that disagree


@pytest.mark.parametrize(
    "names, bounds, message",
    [
        (P3_TO_P7[:3], SIZES, r"need 2 bounds .* got 4\..*: \[64, 128\]"),
        (P3_TO_P7, [64], r"'p7': 128.* need 4 bounds .* got 1"),
        (["p2", "p3", "p4", "p5"], [32, 64, 128], r"IN_FEATURES names \['p2'\], but .*'p3'"),
        (["p3", "p5", "p4"], [64, 128], "increasing stride, finest first"),
        (["p3", "p3", "p4"], [64, 128], "increasing stride, finest first"),
        ([], [], "IN_FEATURES is empty"),
        (P3_TO_P7[:3], [128, 64], r"SIZES_OF_INTEREST .*increasing, got \[128, 64\]"),
        (P3_TO_P7[:3], [0, 64], "SIZES_OF_INTEREST must be positive"),
    ],
)
def test_levels_strides_and_ranges_that_disagree(tiny_cfg, names, bounds, message):
    tiny_cfg.MODEL.FCOS.IN_FEATURES = names
    tiny_cfg.MODEL.FCOS.SIZES_OF_INTEREST = bounds
    with pytest.raises(ValueError, match=message):
        build_model(tiny_cfg)


def test_strides_that_the_backbone_does_not_have(tiny_cfg):
    """Without a config only a check ties the strides of the head to those of the backbone."""
    backbone = build_backbone(tiny_cfg)
    in_python(backbone, P3_TO_P7, SIZES, strides=[8, 16, 32, 64, 128])
    with pytest.raises(ValueError, match="p6 with stride 48, but the backbone .*'p6': 64"):
        in_python(backbone, P3_TO_P7, SIZES, strides=[8, 16, 32, 48, 128])
    with pytest.raises(ValueError, match=r"5 feature maps .* need 5 strides, got 3"):
        in_python(backbone, P3_TO_P7, SIZES, strides=[8, 16, 32])
