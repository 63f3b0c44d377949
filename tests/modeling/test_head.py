"""`FCOSHead`: shapes, options, initial values."""

import math

import pytest
import torch
from detectron2.layers import ShapeSpec
from torch import nn

from fcos_d2.modeling import FCOSHead

SHAPES = [ShapeSpec(channels=32, stride=s) for s in (8, 16)]


def make_features():
    return [torch.randn(2, 32, 5, 7), torch.randn(2, 32, 3, 4)]


def test_outputs_are_levels_one_after_the_other_row_by_row():
    head = FCOSHead(input_shape=SHAPES, num_classes=3, num_cls_convs=1, num_box_convs=2)
    features = make_features()
    logits, ltrb, centerness = head(features)
    assert logits.shape == (2, 35 + 12, 3)
    assert ltrb.shape == (2, 47, 4)
    assert centerness.shape == (2, 47)
    # Location (row 1, column 2) of the second level, computed on its own.
    box_tower = head.box_tower(features[1], 1)
    index = 35 + 1 * 4 + 2
    expected = head.cls_score(head.cls_tower(features[1], 1))[:, :, 1, 2]
    torch.testing.assert_close(logits[:, index], expected)
    torch.testing.assert_close(ltrb[:, index], head.box_pred(box_tower)[:, :, 1, 2].relu())
    torch.testing.assert_close(centerness[:, index], head.centerness(box_tower)[:, 0, 1, 2])


def test_centerness_on_the_class_branch():
    head = FCOSHead(input_shape=SHAPES, num_classes=3, centerness_on_cls=True)
    features = make_features()
    expected = head.centerness(head.cls_tower(features[0], 0)).flatten(1)
    torch.testing.assert_close(head(features)[2][:, :35], expected)


def test_a_scale_a_level():
    head = FCOSHead(input_shape=SHAPES, num_classes=3, use_scale=True)
    features = make_features()
    before = head(features)[1]
    with torch.no_grad():
        head.scales[1].scale.fill_(3.0)
    after = head(features)[1]
    torch.testing.assert_close(after[:, :35], before[:, :35])
    torch.testing.assert_close(after[:, 35:], 3 * before[:, 35:])


@pytest.mark.parametrize("norm, kind", [("GN", nn.GroupNorm), ("", None)])
def test_norm(norm, kind):
    head = FCOSHead(input_shape=SHAPES, num_classes=3, num_cls_convs=2, num_box_convs=3, norm=norm)
    norms = [m for m in head.modules() if kind and isinstance(m, kind)]
    assert len(norms) == (5 if norm else 0)
    assert len([m for m in head.modules() if isinstance(m, nn.Conv2d)]) == 5 + 3


@pytest.mark.parametrize("norm", ["BN", "SyncBN", "naiveSyncBN"])
def test_batch_norms_have_the_statistics_of_their_level(norm):
    """Level 1 is level 0 shifted by 5, so are the means of what the first convolution gives."""
    head = FCOSHead(input_shape=SHAPES, num_classes=3, num_cls_convs=1, num_box_convs=2, norm=norm)
    per_level = head.cls_tower[1]
    assert len(per_level) == len(head.box_tower[1]) == len(head.box_tower[4]) == 2
    assert all(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in per_level)
    if norm == "SyncBN":  # trains on CUDA only
        head.eval()
        assert head(make_features())[0].shape == (2, 47, 3)
        return
    with torch.no_grad():
        head.cls_tower[0].weight.fill_(1 / (9 * 32))
    features = [torch.randn(2, 32, 16, 16), torch.randn(2, 32, 16, 16) + 5]
    head.train()(features)
    # Momentum 0.1 from 0; the border sees zeros of the padding instead of 5.
    assert per_level[0].running_mean.abs().max() < 0.05
    assert (per_level[1].running_mean > 0.1 * 5 * 0.85).all()
    keys = set(head.state_dict())
    assert {"cls_tower.1.0.running_mean", "cls_tower.1.1.running_mean"} <= keys


def test_shared_convolutions_come_before_both_towers():
    head = FCOSHead(
        input_shape=SHAPES, num_classes=3, num_shared_convs=2, num_cls_convs=0, num_box_convs=1
    )
    features = make_features()
    shared = head.share_tower(features[1], 1)
    logits, ltrb, quality = head(features)
    torch.testing.assert_close(logits[:, 35:], head.cls_score(shared).flatten(2).transpose(1, 2))
    box_tower = head.box_tower(shared, 1)
    torch.testing.assert_close(
        ltrb[:, 35:], head.box_pred(box_tower).relu().flatten(2).transpose(1, 2)
    )
    torch.testing.assert_close(quality[:, 35:], head.centerness(box_tower).flatten(1))


def test_exponential_distances_are_in_pixels():
    """A regression of ln 24 is 24 pixels: 3 strides of 8, 1.5 of 16."""
    head = FCOSHead(input_shape=SHAPES, num_classes=3, box_activation="exp", use_scale=True)
    nn.init.zeros_(head.box_pred.weight)
    nn.init.constant_(head.box_pred.bias, math.log(24) / 2)
    for scale in head.scales:
        nn.init.constant_(scale.scale, 2.0)
    _, ltrb, _ = head(make_features())
    torch.testing.assert_close(ltrb[:, :35], torch.full((2, 35, 4), 3.0))
    torch.testing.assert_close(ltrb[:, 35:], torch.full((2, 12, 4), 1.5))


def test_without_quality():
    head = FCOSHead(input_shape=SHAPES, num_classes=3, quality="none")
    assert head(make_features())[2] is None
    assert not any("centerness" in key for key in head.state_dict())


def test_options_that_are_not_known():
    for key, message in (("quality", "QUALITY is 'x'"), ("box_activation", "ACTIVATION is 'x'")):
        with pytest.raises(ValueError, match=message):
            FCOSHead(input_shape=SHAPES, num_classes=3, **{key: "x"})


def test_initial_probability_is_the_prior():
    head = FCOSHead(input_shape=SHAPES, num_classes=80, prior_prob=0.01)
    assert head.cls_score.bias.sigmoid().tolist() == pytest.approx([0.01] * 80)
    assert head.box_pred.weight.std().item() == pytest.approx(0.01, rel=0.1)


def test_every_parameter_learns():
    head = FCOSHead(
        input_shape=SHAPES,
        num_classes=3,
        num_shared_convs=1,
        num_cls_convs=1,
        num_box_convs=1,
        use_scale=True,
    )
    sum(x.sum() for x in head(make_features())).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters())


def test_channels_that_group_norm_cannot_divide():
    with pytest.raises(ValueError, match="32 groups, but 48 channels"):
        FCOSHead(input_shape=[ShapeSpec(channels=48, stride=8)], num_classes=3)


def test_levels_of_different_channels():
    shapes = [ShapeSpec(channels=32, stride=8), ShapeSpec(channels=64, stride=16)]
    with pytest.raises(ValueError, match=r"\[32, 64\]"):
        FCOSHead(input_shape=shapes, num_classes=3)


def test_no_class():
    with pytest.raises(ValueError, match="at least one class"):
        FCOSHead(input_shape=SHAPES, num_classes=0)
