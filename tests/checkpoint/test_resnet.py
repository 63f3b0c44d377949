"""Names in torchvision's ResNet and Detectron2's, compared by the networks' outputs."""

import pytest
import torch
import torchvision
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import build_resnet_backbone

from fcos_d2.checkpoint.resnet import is_torchvision_resnet, torchvision_resnet_name


def make_torchvision_resnet(depth):
    """A random network whose batch norm statistics are not the initial ones."""
    model = getattr(torchvision.models, f"resnet{depth}")(weights=None)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.1)
    return model.eval()


def make_detectron2_resnet(depth):
    cfg = get_cfg()
    cfg.MODEL.RESNETS.DEPTH = depth
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    if depth < 50:
        cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    return build_resnet_backbone(cfg, ShapeSpec(channels=3)).eval()


@pytest.mark.parametrize("depth", [18, 50])
def test_both_networks_compute_the_same(depth):
    theirs, ours = make_torchvision_resnet(depth), make_detectron2_resnet(depth)
    state = theirs.state_dict()
    assert is_torchvision_resnet(state)
    names = {name: torchvision_resnet_name(name) for name in ours.state_dict()}
    unused = [k for k in state.keys() - names.values() if not k.endswith("num_batches_tracked")]
    assert sorted(unused) == ["fc.bias", "fc.weight"]
    ours.load_state_dict({ours_: state[theirs_] for ours_, theirs_ in names.items()}, strict=True)
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        features = ours(x)
        y = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x))))
        for number in range(1, 5):
            y = getattr(theirs, f"layer{number}")(y)
            torch.testing.assert_close(features[f"res{number + 1}"], y, rtol=1e-4, atol=1e-4)


def test_a_part_that_torchvision_lacks_keeps_its_name():
    assert torchvision_resnet_name("res4.1.conv2_offset.weight") == "layer3.1.conv2_offset.weight"
    assert torchvision_resnet_name("stem.conv2.weight") == "stem.conv2.weight"


def test_other_networks_are_not_recognised():
    assert not is_torchvision_resnet(make_detectron2_resnet(18).state_dict())
    assert not is_torchvision_resnet({})
