"""Settings in the state dict, and older state dicts without them."""

import copy
import logging

import pytest
import torch
from detectron2.modeling import build_model

from fcos_d2.modeling.saved_settings import decode_settings, encode_settings

OTHER = {
    "MODEL.PIXEL_MEAN": [1.0, 2.0, 3.0],
    "MODEL.PIXEL_STD": [4.0, 5.0, 6.0],
    "INPUT.FORMAT": "RGB",
    "MODEL.RESNETS.STRIDE_IN_1X1": False,
    "MODEL.FCOS.LOCATION_OFFSET": 0.0,
    "MODEL.FCOS.LOCATION_STEP": "image",
    "MODEL.FCOS.BOX_ACTIVATION": "exp",
    "MODEL.FCOS.CENTERNESS_ON_CLS": True,
}


@pytest.fixture
def cfg(tiny_cfg):
    tiny_cfg.MODEL.RESNETS.DEPTH = 50
    tiny_cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 256
    tiny_cfg.MODEL.RESNETS.STRIDE_IN_1X1 = True
    tiny_cfg.MODEL.FCOS.SCORE_THRESH_TEST = 0.0
    return tiny_cfg


@pytest.fixture
def models(cfg):
    """A model of the config, and one with all settings different."""
    other = cfg.clone()
    other.merge_from_list([x for pair in OTHER.items() for x in pair])
    return build_model(cfg).eval(), build_model(other).eval()


def settings(model):
    generator = model.proposal_generator
    return {
        "MODEL.PIXEL_MEAN": model.pixel_mean.flatten().tolist(),
        "MODEL.PIXEL_STD": model.pixel_std.flatten().tolist(),
        "INPUT.FORMAT": model.trained_format,
        "MODEL.RESNETS.STRIDE_IN_1X1": model.backbone.stride_in_1x1,
        "MODEL.FCOS.LOCATION_OFFSET": generator.location_offset,
        "MODEL.FCOS.LOCATION_STEP": generator.location_step,
        "MODEL.FCOS.BOX_ACTIVATION": generator.head.box_activation,
        "MODEL.FCOS.CENTERNESS_ON_CLS": generator.head.centerness_on_cls,
    }


@torch.no_grad()
def detect(model, image):
    instances = model([{"image": image}])[0]["instances"]
    return torch.cat((instances.pred_boxes.tensor, instances.scores[:, None]), dim=1)


def test_a_state_dict_carries_the_settings(models):
    """Through torch.save, strictly, and into predictions; an image in each model's own order."""
    model, other = models
    assert settings(other) == OTHER and all(settings(model)[k] != v for k, v in OTHER.items())
    with torch.no_grad():
        for parameter in other.proposal_generator.head.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.load_state_dict(other.state_dict(), strict=True)
    assert settings(model) == OTHER and settings(copy.deepcopy(model)) == OTHER
    image = torch.randint(0, 256, (3, 90, 120), dtype=torch.uint8)
    expected = detect(other, image)
    assert model.input_format == "BGR" and len(expected)
    assert torch.equal(detect(model, image.flip(0)), expected)


def test_an_older_state_dict_is_complete(models):
    model, other = models
    state = {k: x for k, x in other.state_dict().items() if "_extra_state" not in k}
    before = settings(model)
    del state["pixel_mean"], state["pixel_std"]
    assert model.load_state_dict(state, strict=True) == ([], [])
    assert settings(model) == before


def test_other_score_rules_are_warned_of(tiny_cfg, caplog):
    """Scores are another function of the same predictions: the config's to choose."""
    model = build_model(tiny_cfg)
    state = model.state_dict()
    with caplog.at_level(logging.WARNING, logger="fcos_d2"):
        model.load_state_dict(state)
        assert not caplog.records
        tiny_cfg.MODEL.FCOS.SCORE, tiny_cfg.MODEL.FCOS.TOPK_ON = "product", "cls"
        other = build_model(tiny_cfg)
        other.load_state_dict(state)
    (record,) = caplog.records
    assert (
        "MODEL.FCOS.SCORE sqrt (now product), MODEL.FCOS.TOPK_ON score (now cls)." in record.message
    )
    assert other.proposal_generator.decoder.score == "product"


def test_a_resnet_without_bottlenecks_has_no_stride_to_save(tiny_cfg):
    model = build_model(tiny_cfg)
    assert model.backbone.stride_in_1x1 is None
    model.load_state_dict(model.state_dict(), strict=True)


def test_a_channel_order_that_can_not_be_converted(models, cfg):
    model, _ = models
    cfg.INPUT.FORMAT = "YUV-BT.601"
    with pytest.raises(ValueError, match=r"trained on BGR images, which YUV-BT\.601 images can't"):
        build_model(cfg).load_state_dict(model.state_dict())


def test_a_proposal_network_carries_its_own(tiny_cfg):
    """In Detectron2's meta architectures only those of our own modules are stored."""
    tiny_cfg.MODEL.META_ARCHITECTURE = "ProposalNetwork"
    other = tiny_cfg.clone()
    other.merge_from_list([x for pair in OTHER.items() for x in pair])
    model = build_model(tiny_cfg)
    model.load_state_dict(build_model(other).state_dict(), strict=True)
    generator = model.proposal_generator
    assert (generator.location_offset, generator.location_step) == (0.0, "image")
    assert generator.head.box_activation == "exp" and generator.head.centerness_on_cls
    assert model.pixel_mean.flatten().tolist() != OTHER["MODEL.PIXEL_MEAN"]


def test_encoding():
    """One length: Detectron2's checkpointers drop tensors of another shape."""
    for value in ({}, {"a": 0.5, "b": None, "c": [1, "x"]}):
        state = encode_settings(value)
        assert state.shape == (512,) and decode_settings(state) == value
    with pytest.raises(ValueError, match="longer than 512 bytes"):
        encode_settings({"a": "x" * 600})
