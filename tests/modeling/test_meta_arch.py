"""`FCOS`: training and inference on every kind of image, errors, Detectron2's tools."""

import numpy as np
import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.analysis import flop_count_operators
from detectron2.utils.events import EventStorage

from fcos_d2.modeling import (
    FCOS,
    CenterSamplingMatcher,
    FCOSDecoder,
    FCOSHead,
    FCOSProposalGenerator,
    build_resnet_fcos_fpn_backbone,
)


def make_input(height, width, boxes=None, classes=None, ignore=None):
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    result = {"image": image, "height": 2 * height, "width": 2 * width, "file_name": "a.jpg"}
    if boxes is not None:
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
        instances.gt_classes = torch.tensor(classes or [0] * len(boxes), dtype=torch.int64)
        if ignore is not None:
            instances.gt_ignore = torch.tensor(ignore, dtype=torch.bool)
        result["instances"] = instances
    return result


# Larger than 64 px, so that P6 is larger than 1 x 1: on the CPU PyTorch 2.14's bfloat16 gradient
# of a 3x3 stride-2 convolution of a 1 x 1 map holds uninitialised memory.
BATCHES = {
    "no box in the batch": [make_input(96, 130, []), make_input(70, 90, [])],
    "one image without boxes": [make_input(96, 96, [[3, 4, 40, 50]]), make_input(96, 96, [])],
    "a box smaller than a stride": [make_input(96, 96, [[10, 10, 14, 14], [1, 1, 2.5, 2]])],
    "one location for several boxes": [
        make_input(96, 96, [[8, 8, 24, 24], [8, 8, 24, 24], [6, 6, 26, 26]], [0, 1, 2])
    ],
    "sizes that no stride divides": [
        make_input(61, 83, [[5, 5, 60, 50]]),
        make_input(37, 131, [[0, 0, 131, 37]]),
    ],
    "boxes out of the image": [make_input(96, 96, [[-20, -30, 40, 50], [50, 50, 90, 200]])],
    "only ignored boxes": [make_input(96, 96, [[8, 8, 40, 40]], ignore=[True])],
}


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("autocast", [False, True])
def test_trains_and_infers(tiny_cfg, name, autocast):
    model = build_model(tiny_cfg)
    batch = BATCHES[name]
    with EventStorage() as storage, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        losses = model(batch)
        values = storage.latest()
    assert set(losses) == {"loss_cls", "loss_box", "loss_ctr"}
    sum(losses.values()).backward()
    for key, loss in losses.items():
        assert loss.isfinite(), key
        assert loss.dtype == torch.float32
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
    wanted = sum(
        (~x["instances"].gt_ignore).sum().item()
        if x["instances"].has("gt_ignore")
        else len(x["instances"])
        for x in batch
    )
    assert ("fcos/gt_covered" in values) == (wanted > 0)
    assert values["fcos/num_pos"][0] >= 0

    model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = model(batch)
    for inputs, output in zip(batch, outputs, strict=True):
        instances = output["instances"]
        assert instances.image_size == (inputs["height"], inputs["width"])
        assert set(instances.get_fields()) == {"pred_boxes", "scores", "pred_classes"}


@pytest.mark.parametrize("quality, expected", [("iou", {"loss_iou"}), ("none", set())])
def test_other_qualities(tiny_cfg, quality, expected):
    tiny_cfg.MODEL.FCOS.QUALITY = quality
    tiny_cfg.MODEL.FCOS.SCORE_THRESH_TEST = 0.0
    model = build_model(tiny_cfg)
    batch = [make_input(96, 96, [[3, 4, 40, 50]])]
    with EventStorage() as storage:
        losses = model(batch)
    assert set(losses) == {"loss_cls", "loss_box"} | expected
    assert ("fcos/loss_iou_excess" in storage.latest()) == bool(expected)
    assert "fcos/loss_ctr_excess" not in storage.latest()
    sum(losses.values()).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
    with torch.no_grad():
        assert len(model.eval()(batch)[0]["instances"]) > 0


@pytest.mark.parametrize(
    ("boxes", "ignore", "coverage", "least_pos"),
    [
        # The box 9..11 lies between the locations 4, 12 of P3 and contains none of any level.
        ([[9, 9, 11, 11], [8, 8, 24, 24], [20, 20, 60, 60]], None, 2 / 3, 4 + 1),
        ([[9, 9, 11, 11], [20, 20, 60, 60]], [True, False], 1.0, 1),  # ignored boxes don't count
    ],
)
def test_logged_coverage(tiny_cfg, boxes, ignore, coverage, least_pos):
    model = build_model(tiny_cfg)
    with EventStorage() as storage:
        model([make_input(64, 64, boxes, ignore=ignore)])
    values = {k: v for k, (v, _) in storage.latest().items()}
    assert values["fcos/gt_covered"] == pytest.approx(coverage)
    assert values["fcos/num_pos"] >= least_pos and values["fcos/loss_ctr_excess"] >= 0


def test_other_images_of_a_batch_change_nothing(tiny_cfg):
    """All norms are per image, so only the padding could: same sizes, same results."""
    tiny_cfg.MODEL.FCOS.SCORE_THRESH_TEST = 0.0
    tiny_cfg.TEST.DETECTIONS_PER_IMAGE = 10
    model = build_model(tiny_cfg).eval()
    # Scores far enough apart that rounding does not change their order.
    torch.nn.init.normal_(model.proposal_generator.head.cls_score.weight, std=0.2)
    inputs = [make_input(64, 96) for _ in range(3)]
    with torch.no_grad():
        together = model(inputs)
        alone = [model([x])[0] for x in inputs]
    for one, other in zip(together, alone, strict=True):
        one, other = one["instances"], other["instances"]
        torch.testing.assert_close(one.scores, other.scores, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            one.pred_boxes.tensor, other.pred_boxes.tensor, rtol=1e-4, atol=1e-2
        )
        assert torch.equal(one.pred_classes, other.pred_classes)


def test_yaml_and_python_build_the_same_model(tiny_cfg):
    """Keyword arguments alone, without a config, give a model that takes the yaml's weights."""
    from_yaml = build_model(tiny_cfg).eval()
    backbone = build_resnet_fcos_fpn_backbone(tiny_cfg, ShapeSpec(channels=3))
    shapes = backbone.output_shape()
    names = ["p3", "p4", "p5", "p6", "p7"]
    from_python = FCOS(
        backbone=backbone,
        proposal_generator=FCOSProposalGenerator(
            in_features=names,
            strides=[shapes[name].stride for name in names],
            head=FCOSHead(
                input_shape=[shapes[name] for name in names],
                num_classes=3,
                num_cls_convs=1,
                num_box_convs=1,
            ),
            matcher=CenterSamplingMatcher(
                num_classes=3, radius=1.5, sizes_of_interest=[64, 128, 256, 512]
            ),
            decoder=FCOSDecoder(),
        ),
        pixel_mean=tiny_cfg.MODEL.PIXEL_MEAN,
        pixel_std=tiny_cfg.MODEL.PIXEL_STD,
    ).eval()
    from_python.load_state_dict(from_yaml.state_dict())
    inputs = [make_input(64, 64)]
    with torch.no_grad():
        one, other = (m(inputs)[0]["instances"] for m in (from_yaml, from_python))
    assert torch.equal(one.pred_boxes.tensor, other.pred_boxes.tensor)


def test_unusable_ground_truth(tiny_cfg):
    model = build_model(tiny_cfg)
    with pytest.raises(ValueError, match=r"a\.jpg has the classes \[3\].*NUM_CLASSES is 3"):
        model([make_input(64, 64, [[1, 1, 30, 30]], [3])])
    with pytest.raises(ValueError, match=r"a\.jpg has no 'instances'"):
        model([make_input(64, 64)])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("BOX_LOSS", "l1", "BOX_LOSS is 'l1'"),
        ("BOX_LOSS_WEIGHT", "area", "BOX_LOSS_WEIGHT is 'area'"),
        ("IN_FEATURES", ["p3", "p4"], r"need 1 bounds .*got 4\. .*8 strides: \[64\]"),
        ("IN_FEATURES", ["p4", "p3", "p5", "p6", "p7"], "finest first"),
        ("LOCATION_STEP", "x", "LOCATION_STEP is 'x'"),
        ("CLASS_AGNOSTIC", True, "CLASS_AGNOSTIC is for proposals"),
        ("IN_FEATURES", ["p2", "p3", "p4", "p5", "p6"], r"names \['p2'\]"),
    ],
)
def test_options_that_do_not_fit(tiny_cfg, key, value, message):
    tiny_cfg.merge_from_list([f"MODEL.FCOS.{key}", value])
    with pytest.raises(ValueError, match=message):
        build_model(tiny_cfg)


def test_number_of_classes_from_the_metadata(tiny_cfg):
    tiny_cfg.MODEL.FCOS.NUM_CLASSES = -1
    tiny_cfg.DATASETS.TRAIN = ("voc_2007_trainval",)
    assert build_model(tiny_cfg).proposal_generator.head.cls_score.out_channels == 20
    tiny_cfg.DATASETS.TRAIN = ("nobody_registered_this",)
    with pytest.raises(ValueError, match="register_source"):
        build_model(tiny_cfg)


def test_training_is_visualized(tiny_cfg):
    tiny_cfg.VIS_PERIOD = 1
    tiny_cfg.MODEL.FCOS.SCORE_THRESH_TEST = 0.0
    model = build_model(tiny_cfg)
    with EventStorage() as storage:
        model([make_input(64, 96, [[3, 4, 40, 50]])])
        ((name, image, _),) = storage._vis_data
    assert "ground truth" in name
    assert image.shape == (3, 64, 2 * 96) and len(np.unique(np.asarray(image))) > 10
    assert model.proposal_generator.training


def test_flop_count(tiny_cfg):
    """As Detectron2's tools/analyze_model.py counts them; the head's share is computed by hand.

    On a 128 x 128 input the levels have 256 + 64 + 16 + 4 + 1 = 341 locations. A 3x3 convolution
    from 64 to c channels costs 9 * 64 * c: two towers (64 each), 3 classes, 4 sides, 1 centerness.
    """
    model = build_model(tiny_cfg).eval()
    inputs = [{"image": torch.zeros(3, 128, 128)}]
    total = flop_count_operators(model, inputs)["conv"]
    head = 341 * 9 * 64 * (64 + 64 + 3 + 4 + 1) / 1e9
    tiny_cfg.MODEL.FCOS.NUM_CLS_CONVS = tiny_cfg.MODEL.FCOS.NUM_BOX_CONVS = 2
    larger = flop_count_operators(build_model(tiny_cfg).eval(), inputs)["conv"]
    assert total > head
    assert larger - total == pytest.approx(341 * 9 * 64 * 128 / 1e9, rel=1e-6)
