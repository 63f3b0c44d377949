"""torchvision's FCOS: names of its tensors, its options and classes."""

import re

import pytest
import torch
import torchvision
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.backbone_utils import mobilenet_backbone, resnet_fpn_backbone
from torchvision.ops.misc import FrozenBatchNorm2d

from fcos_d2.checkpoint import convert
from fcos_d2.checkpoint.keys import is_setting
from fcos_d2.checkpoint.libraries.torchvision import rename

from ..conftest import translate_resnet

HEAD = "proposal_generator.head."
OTHERS = [
    (r"backbone\.fpn\.extra_blocks\.", "backbone.top_block."),
    (r"head\.classification_head\.conv\.", f"{HEAD}cls_tower."),
    (r"head\.classification_head\.cls_logits\.", f"{HEAD}cls_score."),
    (r"head\.regression_head\.conv\.", f"{HEAD}box_tower."),
    (r"head\.regression_head\.bbox_reg\.", f"{HEAD}box_pred."),
    (r"head\.regression_head\.bbox_ctrness\.", f"{HEAD}centerness."),
]


def translate(name, first_level=3):
    """Return our name for one of theirs, from a table in the other direction."""
    if name.endswith("num_batches_tracked"):
        return ()
    if name.startswith("backbone.body."):
        return translate_resnet(name.removeprefix("backbone.body."))
    fpn = re.fullmatch(r"backbone\.fpn\.(inner|layer)_blocks\.(\d)\.(?:0\.)?(\w+)", name)
    if fpn:
        kind = {"inner": "lateral", "layer": "output"}[fpn[1]]
        return f"backbone.fpn_{kind}{int(fpn[2]) + first_level}.{fpn[3]}"
    (ours,) = (re.sub(k, v, name) for k, v in OTHERS if re.match(k, name))
    return ours


@pytest.mark.parametrize(("depth", "norm"), [(18, torch.nn.BatchNorm2d), (50, FrozenBatchNorm2d)])
def test_each_tensor_goes_to_its_place(make_state, assert_landed, depth, norm):
    state = make_state("torchvision", depth=depth, norm_layer=norm)
    converted = convert(state)
    assert converted.source == "torchvision" and converted.notes == []
    assert_landed(converted, state, translate)
    assert {tensor.status for tensor in converted.tensors} == {"loaded"}


def test_its_options(make_state):
    cfg = convert(make_state("torchvision")).cfg
    wanted = {
        "INPUT.FORMAT": "RGB",
        "MODEL.PIXEL_MEAN": pytest.approx([255 * x for x in (0.485, 0.456, 0.406)]),
        "MODEL.PIXEL_STD": pytest.approx([255 * x for x in (0.229, 0.224, 0.225)]),
        "MODEL.RESNETS.STRIDE_IN_1X1": False,
        "MODEL.RESNETS.DEPTH": 18,
        "MODEL.FCOS.LOCATION_OFFSET": 0.0,
        "MODEL.FCOS.LOCATION_STEP": "image",
        "MODEL.FCOS.TOP_BLOCK_IN_FEATURE": "p5",
        "MODEL.FCOS.SCORE_THRESH_TEST": 0.2,
        "MODEL.FCOS.IN_FEATURES": ["p3", "p4", "p5", "p6", "p7"],
    }
    assert {key: cfg[key] for key in wanted} == wanted


def test_its_real_model_has_these_defaults():
    """The threshold, the limits and the normalisation that the model is built with."""
    with torch.device("meta"):
        model = torchvision.models.detection.fcos_resnet50_fpn(weights=None, weights_backbone=None)
    cfg = convert({k: torch.zeros(()).expand(x.shape) for k, x in model.state_dict().items()}).cfg
    assert cfg["MODEL.FCOS.SCORE_THRESH_TEST"] == model.score_thresh
    assert cfg["MODEL.FCOS.NMS_THRESH_TEST"] == model.nms_thresh
    assert cfg["MODEL.FCOS.TOPK_CANDIDATES_TEST"] == model.topk_candidates
    assert cfg["TEST.DETECTIONS_PER_IMAGE"] == model.detections_per_img
    assert cfg["MODEL.PIXEL_MEAN"] == pytest.approx([255 * x for x in model.transform.image_mean])
    assert cfg["MODEL.PIXEL_STD"] == pytest.approx([255 * x for x in model.transform.image_std])


def test_fpn_names_before_it_could_have_norms(make_state, assert_landed):
    state = {
        re.sub(r"(blocks\.\d)\.0\.", r"\1.", name): value
        for name, value in make_state("torchvision").items()
    }
    assert "backbone.fpn.inner_blocks.2.weight" in state
    converted = convert(state)
    assert converted.cfg["MODEL.FPN.NORM"] == ""
    assert_landed(converted, state, translate)


def test_four_blocks_begin_at_p2(make_state, assert_landed):
    state = make_state("torchvision", layers=(1, 2, 3, 4))
    converted = convert(state)
    assert converted.cfg["MODEL.FCOS.IN_FEATURES"] == ["p2", "p3", "p4", "p5", "p6", "p7"]
    assert converted.cfg["MODEL.FCOS.SIZES_OF_INTEREST"] == [32, 64, 128, 256, 512]
    assert_landed(converted, state, lambda name: translate(name, first_level=2))


def rows(state, count):
    """The state with a class predictor whose k-th row is full of k."""
    name = "head.classification_head.cls_logits"
    weight = torch.arange(float(count))[:, None, None, None].expand(count, 256, 3, 3)
    return {**state, f"{name}.weight": weight, f"{name}.bias": torch.arange(float(count))}


def assert_kept(converted, indices):
    assert converted.class_indices == indices
    for end in ("weight", "bias"):
        kept = converted.weights[f"proposal_generator.head.cls_score.{end}"]
        assert kept.reshape(len(indices), -1)[:, 0].tolist() == indices


def test_cocos_91_outputs_become_its_80_classes_in_detectron2s_order(make_state):
    converted = convert(rows(make_state("torchvision", num_classes=91), 91))
    coco = [x for x in COCO_CATEGORIES if x["isthing"]]
    assert converted.class_names == [x["name"] for x in coco]
    assert_kept(converted, [x["id"] for x in coco])  # a slot's number is COCO's id
    assert converted.num_outputs == 91


@pytest.mark.parametrize(
    ("names", "kept_names", "indices"),
    [
        (["a", "b", "c"], ["a", "b", "c"], [1, 2, 3]),  # the first output is the background
        (["__background__", "a", "b", "c"], ["a", "b", "c"], [1, 2, 3]),
        (["a", "b", "N/A", "d"], ["a", "b", "d"], [0, 1, 3]),
        (None, [], [0, 1, 2, 3]),
    ],
)
def test_class_names(make_state, names, kept_names, indices):
    converted = convert(rows(make_state("torchvision", num_classes=4), 4), class_names=names)
    assert converted.class_names == kept_names
    assert_kept(converted, indices)


def test_another_number_of_names(make_state):
    message = "has 4 outputs, but there are 2 class names: name 4, or 3 without the background"
    with pytest.raises(ValueError, match=message):
        convert(make_state("torchvision"), class_names=["a", "b"])


def test_retinanet_and_another_backbone_are_refused():
    with torch.device("meta"):
        resnet = resnet_fpn_backbone(backbone_name="resnet18", weights=None)
        mobilenet = mobilenet_backbone(backbone_name="mobilenet_v3_small", weights=None, fpn=True)
        retinanet, fcos = RetinaNet(resnet, 4).state_dict(), FCOS(mobilenet, 4).state_dict()
    with pytest.raises(ValueError, match=r"not recognised.*backbone\.body\.conv1\.weight.*--from"):
        convert(retinanet)
    with pytest.raises(ValueError, match="its backbone is not a ResNet-18, -34"):
        convert(fcos, partial=True)


def test_there_is_no_p6_without_p7(make_state):
    state = {k: x for k, x in make_state("torchvision").items() if ".p7." not in k}
    with pytest.raises(
        ValueError, match=r"missing, top_block \(2\): backbone\.fpn\.extra_blocks\.p7"
    ):
        convert(state)


def test_names_forward_and_backward(make_state):
    """torchvision's model gets its own tensors back from ours."""
    state = make_state("torchvision")
    weights = convert(state).weights
    weights = {name: tensor for name, tensor in weights.items() if not is_setting(name)}
    back = {rename(name, state): tensor for name, tensor in weights.items()}
    assert len(back) == len(weights)
    wanted = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    assert back.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(back[name], tensor), name
