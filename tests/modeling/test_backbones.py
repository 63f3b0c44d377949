"""The head on Detectron2's backbones and on levels from 3 to 6."""

import importlib.machinery
import importlib.util

import pytest
import torch
from detectron2.modeling import FPN, build_model
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

ALL_STAGES = ["res2", "res3", "res4", "res5"]
DEEP = {"MODEL.RESNETS.RES2_OUT_CHANNELS": 256}

# The small model of tiny_cfg, but for these keys.
BACKBONES = {
    "ResNet-18": {},
    "ResNet-50": {"MODEL.RESNETS.DEPTH": 50, **DEEP},
    "ResNet-101": {"MODEL.RESNETS.DEPTH": 101, **DEEP},
    "ResNeXt-50 32x4d": {
        "MODEL.RESNETS.DEPTH": 50,
        "MODEL.RESNETS.NUM_GROUPS": 32,
        "MODEL.RESNETS.WIDTH_PER_GROUP": 4,
        **DEEP,
    },
    "Detectron2's FPN, P6 by pooling": {
        "MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone",
        "MODEL.RESNETS.OUT_FEATURES": ALL_STAGES,
        "MODEL.FPN.IN_FEATURES": ALL_STAGES,
        "MODEL.FCOS.IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
        "MODEL.FCOS.SIZES_OF_INTEREST": [32, 64, 128, 256],
    },
    "RetinaNet's FPN, P6 from C5": {
        "MODEL.BACKBONE.NAME": "build_retinanet_resnet_fpn_backbone",
    },
}
# IN_FEATURES: SIZES_OF_INTEREST
LEVELS = {
    ("p3", "p4", "p5"): [64, 128],
    ("p3", "p4", "p5", "p6"): [64, 128, 256],
    ("p3", "p4", "p5", "p6", "p7"): [64, 128, 256, 512],
    ("p2", "p3", "p4", "p5", "p6", "p7"): [32, 64, 128, 256, 512],
}


def with_keys(cfg, keys):
    cfg.merge_from_list([x for pair in keys.items() for x in pair])
    return cfg


def make_batch(device="cpu"):
    """Boxes of 20, 84 and 120 pixels: with usual ranges they fall on three levels."""
    batch = []
    for width, boxes in ((128, [[10, 20, 30, 40], [4, 2, 124, 90]]), (96, [[6, 6, 90, 80]])):
        instances = Instances((96, width), gt_boxes=Boxes(torch.tensor(boxes).float()))
        instances.gt_classes = torch.arange(len(boxes))
        image = torch.randint(0, 256, (3, 96, width), dtype=torch.uint8)
        batch.append({"image": image.to(device), "instances": instances.to(device)})
    return batch


def train_one_step(model, batch):
    """One step of SGD: every parameter has a gradient, no weight of FPN and head one of 0."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with EventStorage() as storage:
        losses = model.train()(batch)
        assert storage.latest()["fcos/num_pos"][0] > 0
    assert set(losses) == {"loss_cls", "loss_box", "loss_ctr"}
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        if "bottom_up" not in name and name.endswith("weight"):
            assert parameter.grad.any(), name
    optimizer.step()


def detect(model, batch):
    model.proposal_generator.decoder.score_thresh = 0.0
    with torch.no_grad():
        outputs = model.eval()(batch)
    assert all(len(x["instances"]) for x in outputs)


@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_trains(tiny_cfg, name):
    model = build_model(with_keys(tiny_cfg, BACKBONES[name]))
    batch = make_batch()
    train_one_step(model, batch)
    detect(model, batch)


@pytest.mark.parametrize("names", LEVELS, ids="-".join)
def test_every_number_of_levels_trains(tiny_cfg, names):
    keys = {
        "MODEL.FCOS.IN_FEATURES": list(names),
        "MODEL.FCOS.SIZES_OF_INTEREST": LEVELS[names],
        "MODEL.FCOS.USE_SCALE": True,  # a parameter a level
    }
    if "p2" in names:
        keys |= {"MODEL.RESNETS.OUT_FEATURES": ALL_STAGES, "MODEL.FPN.IN_FEATURES": ALL_STAGES}
    model = build_model(with_keys(tiny_cfg, keys))
    assert model.proposal_generator.strides == [2 ** int(name[1]) for name in names]
    batch = make_batch()
    train_one_step(model, batch)
    detect(model, batch)


def test_regnet_trains():
    """Built in Python: Detectron2 has no yaml key for it. Its stages s2, s3, s4 have stride 4 .."""
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
    model = in_python(backbone, ["p3", "p4", "p5", "p6", "p7"], [64, 128, 256, 512])
    assert model.proposal_generator.strides == [8, 16, 32, 64, 128]
    batch = make_batch()
    train_one_step(model, batch)
    detect(model, batch)


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


DEFORMABLE = {
    "MODEL.RESNETS.DEPTH": 50,
    "MODEL.RESNETS.DEFORM_ON_PER_STAGE": [False, True, True, True],
    **DEEP,
}


def test_deformable_resnet_detects(tiny_cfg):
    """On the CPU Detectron2 takes torchvision's operator, which it can't train."""
    model = build_model(with_keys(tiny_cfg, DEFORMABLE))
    detect(model, make_batch())


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
    batch = make_batch("cuda")
    train_one_step(model, batch)
    detect(model, batch)


@pytest.mark.parametrize(
    "names, bounds, message",
    [
        (["p3", "p4", "p5"], [64, 128, 256, 512], r"need 2 bounds .* got 4\..*: \[64, 128\]"),
        (["p3", "p4", "p5", "p6", "p7"], [64], r"'p7': 128.* need 4 bounds .* got 1"),
        (["p2", "p3", "p4", "p5"], [32, 64, 128], r"IN_FEATURES names \['p2'\], but .*'p3'"),
        (["p3", "p5", "p4"], [64, 128], "increasing stride, finest first"),
        (["p3", "p3", "p4"], [64, 128], "increasing stride, finest first"),
        ([], [], "IN_FEATURES names no feature map"),
        (["p3", "p4", "p5"], [128, 64], r"SIZES_OF_INTEREST .*increasing, got \[128, 64\]"),
        (["p3", "p4", "p5"], [0, 64], "SIZES_OF_INTEREST has to be positive"),
    ],
)
def test_levels_strides_and_ranges_that_disagree(tiny_cfg, names, bounds, message):
    tiny_cfg.MODEL.FCOS.IN_FEATURES = names
    tiny_cfg.MODEL.FCOS.SIZES_OF_INTEREST = bounds
    with pytest.raises(ValueError, match=message):
        build_model(tiny_cfg)


def test_strides_that_the_backbone_does_not_have(tiny_cfg):
    """In Python nothing but a check ties the strides of the head to those of the backbone."""
    backbone = build_model(tiny_cfg).backbone
    names = ["p3", "p4", "p5", "p6", "p7"]
    in_python(backbone, names, [64, 128, 256, 512], strides=[8, 16, 32, 64, 128])
    with pytest.raises(ValueError, match="p6 with stride 48, but the backbone .*'p6': 64"):
        in_python(backbone, names, [64, 128, 256, 512], strides=[8, 16, 32, 48, 128])
    with pytest.raises(ValueError, match=r"5 feature maps .*3 strides"):
        in_python(backbone, names, [64, 128, 256, 512], strides=[8, 16, 32])
