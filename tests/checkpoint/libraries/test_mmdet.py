"""mmdet's FCOS: names of its tensors, and options from the text of its config."""

import re

import pytest
import torch

from fcos_d2.checkpoint import convert

from ..conftest import translate_resnet

HEAD = "proposal_generator.head."
LITERAL = {
    "neck.lateral_convs.0.conv": "backbone.fpn_lateral3",
    "neck.lateral_convs.1.conv": "backbone.fpn_lateral4",
    "neck.lateral_convs.2.conv": "backbone.fpn_lateral5",
    "neck.fpn_convs.0.conv": "backbone.fpn_output3",
    "neck.fpn_convs.1.conv": "backbone.fpn_output4",
    "neck.fpn_convs.2.conv": "backbone.fpn_output5",
    "neck.fpn_convs.3.conv": "backbone.top_block.p6",
    "neck.fpn_convs.4.conv": "backbone.top_block.p7",
    "bbox_head.cls_convs.0.conv": f"{HEAD}cls_tower.0",
    "bbox_head.cls_convs.1.conv": f"{HEAD}cls_tower.3",
    "bbox_head.reg_convs.0.conv": f"{HEAD}box_tower.0",
    "bbox_head.reg_convs.1.conv": f"{HEAD}box_tower.3",
    "bbox_head.cls_convs.0.gn": f"{HEAD}cls_tower.1",
    "bbox_head.cls_convs.1.gn": f"{HEAD}cls_tower.4",
    "bbox_head.reg_convs.0.gn": f"{HEAD}box_tower.1",
    "bbox_head.reg_convs.1.gn": f"{HEAD}box_tower.4",
    "bbox_head.conv_cls": f"{HEAD}cls_score",
    "bbox_head.conv_reg": f"{HEAD}box_pred",
    "bbox_head.conv_centerness": f"{HEAD}centerness",
}
TOWER_BIASES = [f"{HEAD}{tower}.{k}.bias" for tower in ("cls_tower", "box_tower") for k in (0, 3)]


def translate(name):
    """Return our names for one of theirs; a batch norm of its head is for all five levels."""
    module, _, kind = name.rpartition(".")
    shared = re.fullmatch(r"bbox_head\.(cls|reg)_convs\.(\d)\.bn", module)
    if shared:
        tower = {"cls": "cls_tower", "reg": "box_tower"}[shared[1]]
        return [f"{HEAD}{tower}.{3 * int(shared[2]) + 1}.{level}.{kind}" for level in range(5)]
    if kind == "num_batches_tracked":
        return ()
    if name.startswith("backbone."):
        return translate_resnet(name.removeprefix("backbone."))
    return f"{LITERAL.get(module, module.replace('bbox_head.', HEAD))}.{kind}"


@pytest.mark.parametrize(
    ("differences", "norm", "filled"),
    [
        # The towers' convolutions have no bias before a norm there: ours are zero.
        ({}, "GN", TOWER_BIASES),
        ({"depth": 50}, "GN", TOWER_BIASES),
        ({"kind": "bn"}, "BN", TOWER_BIASES),
        ({"bias": True}, "GN", []),
        ({"kind": "", "num_convs": 1}, "", []),
    ],
)
def test_tensors(make_state, assert_landed, differences, norm, filled):
    state = make_state("mmdet", **differences)
    converted = convert({"meta": {}, "state_dict": state})
    assert converted.source == "mmdet" and converted.cfg["MODEL.FCOS.NORM"] == norm
    assert_landed(converted, state, translate, filled=filled)
    if norm == "GN":
        assert sum(x.status == "filled" for x in converted.tensors) == len(filled)


def test_a_missing_bias_among_others(make_state):
    state = make_state("mmdet", bias=True)
    del state["bbox_head.cls_convs.1.conv.bias"]
    with pytest.raises(
        ValueError, match=r"missing, cls_tower \(1\): bbox_head\.cls_convs\.1\.conv"
    ):
        convert(state)


def test_norms_in_the_neck(make_state):
    state = make_state("mmdet")
    for k in range(3):
        for part in ("lateral", "fpn"):
            del state[f"neck.{part}_convs.{k}.conv.bias"]
            for kind in ("weight", "bias", "running_mean", "running_var"):
                state[f"neck.{part}_convs.{k}.bn.{kind}"] = torch.full((64,), 1000.0 + k)
    converted = convert(state)
    assert converted.cfg["MODEL.FPN.NORM"] == "FrozenBN"
    assert (converted.weights["backbone.fpn_output4.norm.running_var"] == 1001).all()


# As mmengine writes a config: all of it in one text, in keyword arguments.
CONFIG_3X = """
auto_scale_lr = dict(base_batch_size=16, enable=False)
backend_args = None
model = dict(
    backbone=dict(depth=50, style='{style}', type='ResNet'),
    bbox_head=dict(
        center_sampling=True,
        {head}
        num_classes=3,
        strides=[8, 16, 32, 64, 128],
        type='FCOSHead'),
    data_preprocessor=dict(
        bgr_to_rgb={rgb},
        mean=[123.675, 116.28, 103.53],
        pad_size_divisor=32,
        std=[58.395, 57.12, 57.375],
        type='DetDataPreprocessor'),
    neck=dict(
        add_extra_convs={extra},
        in_channels=[256, 512, 1024, 2048],
        num_outs=5,
        relu_before_extra_convs={relu},
        start_level=1,
        type='FPN'),
    test_cfg=dict(
        max_per_img=50, min_bbox_size=0, nms=dict(iou_threshold=0.6, type='nms'),
        nms_pre=500, score_thr=0.1),
    type='FCOS')
test_cfg = dict(type='TestLoop')
train_pipeline = [dict(type='LoadImageFromFile'), ]
"""


def make_config(**what):
    usual = {"head": "", "rgb": True, "extra": "'on_output'", "relu": True}
    return CONFIG_3X.format(**{"style": "pytorch", **usual, **what})


def read(make_state, text, key="cfg", **state):
    return convert({"state_dict": make_state("mmdet", **state), "meta": {key: text}})


def test_the_config_of_mmdet_3(make_state):
    head = "norm_on_bbox=True, centerness_on_reg=True,"
    converted = read(make_state, make_config(head=head))
    wanted = {
        "INPUT.FORMAT": "RGB",
        "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
        "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
        "MODEL.RESNETS.STRIDE_IN_1X1": False,
        "MODEL.FCOS.BOX_ACTIVATION": "relu",
        "MODEL.FCOS.CENTERNESS_ON_CLS": False,
        "MODEL.FCOS.TOP_BLOCK_IN_FEATURE": "p5",
        "MODEL.FCOS.USE_SCALE": True,
        "MODEL.FCOS.SCORE": "product",
        "MODEL.FCOS.SCORE_THRESH_ON": "cls",
        "MODEL.FCOS.TOPK_ON": "cls",
        "MODEL.FCOS.CLIP_BEFORE_NMS": True,
        "MODEL.FCOS.LOCATION_OFFSET": 0.5,
        "MODEL.FCOS.SCORE_THRESH_TEST": 0.1,
        "MODEL.FCOS.TOPK_CANDIDATES_TEST": 500,
        "MODEL.FCOS.NMS_THRESH_TEST": 0.6,
        "TEST.DETECTIONS_PER_IMAGE": 50,
    }
    assert {key: converted.cfg[key] for key in wanted} == wanted
    assert converted.notes == []


def test_options_missing_in_a_config_are_mmdets_defaults(make_state):
    converted = read(make_state, make_config(style="caffe", rgb=False))
    wanted = {
        "INPUT.FORMAT": "BGR",
        "MODEL.RESNETS.STRIDE_IN_1X1": True,
        "MODEL.FCOS.BOX_ACTIVATION": "exp",
        "MODEL.FCOS.CENTERNESS_ON_CLS": True,
    }
    assert {key: converted.cfg[key] for key in wanted} == wanted


def test_the_config_of_mmdet_2(make_state):
    text = """
img_norm_cfg = dict(mean=[102.9801, 115.9465, 122.7717], std=[1.0, 1.0, 1.0], to_rgb=False)
data = dict(samples_per_gpu=2, train=dict(pipeline=[dict(type='Normalize', **img_norm_cfg)]))
model = dict(
    type='FCOS',
    backbone=dict(type='ResNet', style='caffe'),
    neck=dict(type='FPN', add_extra_convs=True, relu_before_extra_convs=True),
    bbox_head=dict(type='FCOSHead', norm_on_bbox=True))
test_cfg = dict(nms_pre=1000, score_thr=0.05, nms=dict(type='nms', iou_threshold=0.5))
"""
    converted = read(make_state, text, key="config", top_channels=512)
    wanted = {
        "INPUT.FORMAT": "BGR",
        "MODEL.PIXEL_MEAN": [102.9801, 115.9465, 122.7717],
        "MODEL.FCOS.BOX_ACTIVATION": "relu",
        "MODEL.FCOS.TOP_BLOCK_IN_FEATURE": "res5",  # of "True"
        "MODEL.FCOS.NMS_THRESH_TEST": 0.5,
        "TEST.DETECTIONS_PER_IMAGE": 100,
    }
    assert {key: converted.cfg[key] for key in wanted} == wanted
    assert converted.notes == []


def test_the_first_names_and_options_of_mmdet_2(make_state, assert_landed):
    """Predictors fcos_*, iou_thr, and P6 from P5 said by two options."""
    new = make_state("mmdet")
    state = {re.sub(r"conv_(cls|reg|centerness)", r"fcos_\1", k): x for k, x in new.items()}
    assert "bbox_head.fcos_centerness.bias" in state and "bbox_head.conv_cls.bias" not in state
    text = """
img_norm_cfg = dict(mean=[1, 2, 3], std=[1, 1, 1], to_rgb=False)
model = dict(neck=dict(
    add_extra_convs=True, extra_convs_on_inputs=False, relu_before_extra_convs=True))
test_cfg = dict(nms=dict(type='nms', iou_thr=0.7))
"""
    converted = convert({"state_dict": state, "meta": {"config": text}})
    assert converted.source == "mmdet"
    assert_landed(
        converted, state, lambda k: translate(k.replace(".fcos_", ".conv_")), TOWER_BIASES
    )
    assert converted.cfg["MODEL.FCOS.TOP_BLOCK_IN_FEATURE"] == "p5"
    assert converted.cfg["MODEL.FCOS.NMS_THRESH_TEST"] == 0.7


@pytest.mark.parametrize("name", ["'mmdet.models.dense_heads.FCOSHead'", "FCOSHead", "d.FCOSHead"])
def test_a_type_with_its_modules_or_a_class(make_state, name):
    text = make_config(head="norm_on_bbox=True,")
    converted = read(make_state, text.replace("'FCOSHead'", name))
    assert converted.cfg["MODEL.FCOS.BOX_ACTIVATION"] == "relu"
    assert converted.notes == []
    with pytest.raises(ValueError, match="its bbox_head is a NASFCOSHead"):
        read(make_state, text.replace("'FCOSHead'", name.replace("FCOSHead", "NASFCOSHead")))


def test_unreadable_entries_of_a_config_are_skipped(make_state):
    head = "norm_on_bbox=True, regress_ranges=((-1, 64), (64, float('inf'))),"
    converted = read(make_state, make_config(head=head))
    assert converted.cfg["MODEL.FCOS.BOX_ACTIVATION"] == "relu"
    assert converted.cfg["MODEL.FCOS.TOPK_CANDIDATES_TEST"] == 500
    assert converted.notes == [
        "Unreadable in its config, so ignored: model.bbox_head.regress_ranges."
    ]


@pytest.mark.parametrize("text", [None, "", "/home/me/fcos.py\nmodel = (", "(" * 5000, "x = 1"])
def test_without_a_config_the_recipe_and_a_remark(make_state, text):
    converted = read(make_state, text)
    assert converted.cfg["MODEL.FCOS.BOX_ACTIVATION"] == "exp"
    assert converted.cfg["MODEL.FCOS.CENTERNESS_ON_CLS"] is True
    assert converted.cfg["MODEL.PIXEL_MEAN"] == [102.9801, 115.9465, 122.7717]
    assert converted.cfg["INPUT.FORMAT"] == "BGR"
    assert converted.cfg["MODEL.RESNETS.STRIDE_IN_1X1"] is True
    assert converted.cfg["MODEL.FCOS.NMS_THRESH_TEST"] == 0.5
    (note,) = converted.notes
    assert "no readable config" in note and "MODEL.FCOS.BOX_ACTIVATION" in note
    assert "the recipe fcos_r50-caffe_fpn_gn-head_1x_coco." in note


def test_without_a_config_biases_before_norms_tell_the_recipe(make_state):
    converted = convert(make_state("mmdet", bias=True))
    wanted = {
        "MODEL.FCOS.BOX_ACTIVATION": "relu",
        "MODEL.FCOS.CENTERNESS_ON_CLS": False,
        "MODEL.PIXEL_MEAN": [103.53, 116.28, 123.675],
        "MODEL.PIXEL_STD": [1.0, 1.0, 1.0],
        "INPUT.FORMAT": "BGR",
        "MODEL.RESNETS.STRIDE_IN_1X1": True,
        "MODEL.FCOS.NMS_THRESH_TEST": 0.6,
    }
    assert {key: converted.cfg[key] for key in wanted} == wanted
    (note,) = converted.notes
    assert "fcos_r50-caffe_fpn_gn-head-center-normbbox-centeronreg-giou_1x_coco." in note
    no_norm = convert(make_state("mmdet", kind=""))  # where biases are usual
    assert no_norm.cfg["MODEL.FCOS.BOX_ACTIVATION"] == "exp"


def test_overrides(make_state):
    overrides = {"MODEL.FCOS.BOX_ACTIVATION": "relu", "MODEL.PIXEL_MEAN": [1.0, 2.0, 3.0]}
    cfg = convert(make_state("mmdet"), overrides=overrides).cfg
    assert {key: cfg[key] for key in overrides} == overrides


def test_the_config_is_not_executed(make_state, tmp_path):
    path = tmp_path / "ran"
    text = f"model = dict(bbox_head=dict(x=open({str(path)!r}, 'w')), "
    text += "neck=dict(relu_before_extra_convs=True))\n"
    text += f"open({str(path)!r}, 'w')"
    converted = read(make_state, text)
    assert not path.exists()
    assert converted.notes == ["Unreadable in its config, so ignored: model.bbox_head.x."] + [
        "The config in the file has no mean and std of pixels: those of the recipe "
        "fcos_r50-caffe_fpn_gn-head_1x_coco are used "
        "(MODEL.PIXEL_MEAN, MODEL.PIXEL_STD, INPUT.FORMAT)."
    ]


@pytest.mark.parametrize(
    ("old", "new", "note"),
    [
        ("type='nms'", "type='soft_nms'", "Its soft_nms is replaced by plain NMS."),
        ("type='nms'", "type='nms', class_agnostic=True", "class_agnostic NMS is replaced"),
        ("min_bbox_size=0", "min_bbox_size=16", "Its min_bbox_size 16 is replaced by 0"),
        ("min_bbox_size=0", "min_bbox_size=-1", "Its min_bbox_size -1 is replaced by 0"),
        ("pad_size_divisor=32", "pad_size_divisor=128", "to multiples of 128 pixels"),
        ("pad_size_divisor=32,", "", "to multiples of 1 pixels"),  # the default
    ],
)
def test_differences_in_detail_are_noted(make_state, old, new, note):
    (said,) = read(make_state, make_config().replace(old, new)).notes
    assert note in said
    assert read(make_state, make_config()).notes == []


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ({"relu": False}, "without a ReLU on P6"),
        ({"extra": "'on_lateral'"}, "P6 from a lateral convolution"),
        (
            {"head": "norm_cfg=dict(type='GN', num_groups=16),"},
            "its bbox_head.norm_cfg.num_groups is 16, not 32",
        ),
        (
            {"head": "loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=False),"},
            "its bbox_head.loss_cls.use_sigmoid is False, not True",
        ),
        ({"relu": "True, act_cfg=dict(type='ReLU')"}, "its neck.act_cfg is .*'ReLU'.*, not None"),
        (
            {"relu": "True, upsample_cfg=dict(mode='bilinear')"},
            "its neck.upsample_cfg.mode is bilinear, not nearest",
        ),
    ],
)
def test_configs_of_other_networks_are_refused(make_state, what, message):
    with pytest.raises(ValueError, match=message):
        read(make_state, make_config(**what))


def test_supported_options_may_be_in_a_config(make_state):
    head = "norm_cfg=dict(type='GN', num_groups=32), loss_cls=dict(use_sigmoid=True),"
    relu = "True, act_cfg=None, upsample_cfg=dict(mode='nearest')"
    assert read(make_state, make_config(head=head, relu=relu)).notes == []
    text = make_config().replace("FCOSHead", "NASFCOSHead").replace("[8, 16", "[4, 16")
    with pytest.raises(
        ValueError, match=r"is a NASFCOSHead; its strides are \[4, 16, 32, 64, 128\]"
    ):
        read(make_state, text)


@pytest.mark.parametrize(
    ("meta", "names"),
    [
        ({"CLASSES": ("a", "b", "c")}, ["a", "b", "c"]),
        ({"dataset_meta": {"classes": ("a", "b", "c"), "palette": [(1, 2, 3)]}}, ["a", "b", "c"]),
        ({"dataset_meta": {"CLASSES": ["a", "b", "c"]}}, ["a", "b", "c"]),
        ({"CLASSES": "person"}, ["person"]),
    ],
)
def test_class_names_are_in_the_file(make_state, meta, names):
    state = make_state("mmdet", num_classes=len(names))
    assert convert({"state_dict": state, "meta": meta}).class_names == names
