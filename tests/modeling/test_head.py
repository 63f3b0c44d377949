"""`FCOSHead`: shapes, options, initial values."""

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
    box_tower = head.box_tower(features[1])
    index = 35 + 1 * 4 + 2
    expected = head.cls_score(head.cls_tower(features[1]))[:, :, 1, 2]
    torch.testing.assert_close(logits[:, index], expected)
    torch.testing.assert_close(ltrb[:, index], head.box_pred(box_tower)[:, :, 1, 2].relu())
    torch.testing.assert_close(centerness[:, index], head.centerness(box_tower)[:, 0, 1, 2])


def test_centerness_on_the_class_branch():
    head = FCOSHead(input_shape=SHAPES, num_classes=3, centerness_on_cls=True)
    features = make_features()
    expected = head.centerness(head.cls_tower(features[0])).flatten(1)
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


@pytest.mark.parametrize("norm, kind", [("GN", nn.GroupNorm), ("BN", nn.BatchNorm2d), ("", None)])
def test_norm(norm, kind):
    head = FCOSHead(input_shape=SHAPES, num_classes=3, num_cls_convs=2, num_box_convs=3, norm=norm)
    norms = [m for m in head.modules() if kind and isinstance(m, kind)]
    assert len(norms) == (5 if norm else 0)
    assert len([m for m in head.modules() if isinstance(m, nn.Conv2d)]) == 5 + 3


def test_initial_probability_is_the_prior():
    head = FCOSHead(input_shape=SHAPES, num_classes=80, prior_prob=0.01)
    assert head.cls_score.bias.sigmoid().tolist() == pytest.approx([0.01] * 80)
    assert head.box_pred.weight.std().item() == pytest.approx(0.01, rel=0.1)


def test_every_parameter_learns():
    head = FCOSHead(
        input_shape=SHAPES, num_classes=3, num_cls_convs=1, num_box_convs=1, use_scale=True
    )
    sum(x.sum() for x in head(make_features())).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters())


def test_channels_that_group_norm_cannot_divide():
    with pytest.raises(ValueError, match="32 groups.*48 channels"):
        FCOSHead(input_shape=[ShapeSpec(channels=48, stride=8)], num_classes=3)


def test_levels_of_different_channels():
    shapes = [ShapeSpec(channels=32, stride=8), ShapeSpec(channels=64, stride=16)]
    with pytest.raises(ValueError, match=r"\[32, 64\]"):
        FCOSHead(input_shape=shapes, num_classes=3)


def test_no_class():
    with pytest.raises(ValueError, match="at least one class"):
        FCOSHead(input_shape=SHAPES, num_classes=0)
