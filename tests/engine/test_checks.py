"""What the meta architecture asks of config and data."""

import pytest

from fcos_d2.engine.checks import check_training, class_nodes, set_num_classes

NAMES = ["ball", "box", "cone"]


@pytest.fixture
def rcnn_cfg(tiny_cfg):
    tiny_cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    tiny_cfg.INPUT.DIFFICULT = tiny_cfg.INPUT.CROWD = "drop"
    return tiny_cfg


def test_number_of_classes_of_one_stage(tiny_cfg):
    """The ROI heads' 80, which Detectron2 has by default, are of no interest."""
    for meta_arch in ("FCOS", "ProposalNetwork"):
        tiny_cfg.MODEL.META_ARCHITECTURE = meta_arch
        tiny_cfg.MODEL.FCOS.NUM_CLASSES = -1
        set_num_classes(tiny_cfg, "some:data", NAMES)
        assert list(class_nodes(tiny_cfg)) == ["MODEL.FCOS"]
        assert tiny_cfg.MODEL.FCOS.NUM_CLASSES == 3
        assert tiny_cfg.MODEL.ROI_HEADS.NUM_CLASSES == 80


def test_number_of_classes_of_roi_heads(rcnn_cfg):
    rcnn_cfg.MODEL.ROI_HEADS.NUM_CLASSES = -1
    set_num_classes(rcnn_cfg, "some:data", NAMES)
    assert list(class_nodes(rcnn_cfg)) == ["MODEL.FCOS", "MODEL.ROI_HEADS"]
    assert [node.NUM_CLASSES for node in class_nodes(rcnn_cfg).values()] == [3, 3]


@pytest.mark.parametrize(
    "node, message",
    [
        ("FCOS", r"MODEL.FCOS.NUM_CLASSES is 5, but some:data has 3 .*cone\): set it to 3, or"),
        ("ROI_HEADS", r"MODEL.ROI_HEADS.NUM_CLASSES is 5, but some:data has 3 .*set it to 3, or"),
    ],
)
def test_another_number_of_classes(rcnn_cfg, node, message):
    rcnn_cfg.MODEL.FCOS.NUM_CLASSES = rcnn_cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3
    rcnn_cfg.MODEL[node].NUM_CLASSES = 5
    with pytest.raises(ValueError, match=message):
        set_num_classes(rcnn_cfg, "some:data", NAMES)


def test_another_number_of_classes_in_a_lazy_config(tiny_cfg):
    tiny_cfg.MODEL.META_ARCHITECTURE, tiny_cfg.MODEL.LAZY = "LazyModel", "model: {}"
    tiny_cfg.MODEL.FCOS.NUM_CLASSES = 5
    key = "model.proposal_generator.head.num_classes"
    with pytest.raises(ValueError, match=f"{key} is 5, but .* 3 classes .*: set {key}=3"):
        set_num_classes(tiny_cfg, "some:data", NAMES)


@pytest.mark.parametrize("key", ["DIFFICULT", "CROWD"])
def test_roi_heads_know_no_ignored_objects(rcnn_cfg, key):
    check_training(rcnn_cfg)
    rcnn_cfg.INPUT[key] = "ignore"
    with pytest.raises(ValueError, match=f"INPUT.{key} is 'ignore', .*GeneralizedRCNN.*'drop'"):
        check_training(rcnn_cfg)


@pytest.mark.parametrize("key", ["MASK_ON", "KEYPOINT_ON"])
def test_data_for_boxes_only(rcnn_cfg, key):
    rcnn_cfg.MODEL[key] = True
    with pytest.raises(ValueError, match=f"MODEL.{key} is True, .* boxes only"):
        check_training(rcnn_cfg)


@pytest.mark.parametrize("meta_arch", ["FCOS", "ProposalNetwork", "LazyModel"])
def test_one_stage_ignores_objects(tiny_cfg, meta_arch):
    tiny_cfg.MODEL.META_ARCHITECTURE = meta_arch
    assert tiny_cfg.INPUT.DIFFICULT == tiny_cfg.INPUT.CROWD == "ignore"
    check_training(tiny_cfg)
