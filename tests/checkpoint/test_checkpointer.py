"""`FCOSCheckpointer`: what it writes, what it reads, what it refuses."""

import logging

import pytest
import torch
import torchvision
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model

from fcos_d2.checkpoint import FCOSCheckpointer, read_class_names

NAMES = ["circle", "square", "star"]


@pytest.fixture
def model(tiny_cfg):
    return build_model(tiny_cfg)


def weights_of(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def assert_same_weights(one, other):
    assert one.keys() == other.keys()
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=0, atol=0)


def test_class_names_travel_inside(model, tmp_path):
    FCOSCheckpointer(model, str(tmp_path), class_names=NAMES).save("model_final", iteration=7)
    path = str(tmp_path / "model_final.pth")
    assert read_class_names(path) == NAMES
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last_checkpoint", "model_final.pth"]
    before = weights_of(model)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    extra = FCOSCheckpointer(model, class_names=NAMES).load(path)
    assert extra["iteration"] == 7
    assert_same_weights(weights_of(model), before)


def test_detectron2s_own_checkpointer_reads_it(model, tmp_path):
    FCOSCheckpointer(model, str(tmp_path), class_names=NAMES).save("a")
    before = weights_of(model)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    DetectionCheckpointer(model).load(str(tmp_path / "a.pth"))
    assert_same_weights(weights_of(model), before)


def test_a_save_that_fails_leaves_the_old_file(model, tmp_path, monkeypatch):
    checkpointer = FCOSCheckpointer(model, str(tmp_path), class_names=NAMES)
    checkpointer.save("a")
    content = (tmp_path / "a.pth").read_bytes()

    def fail(data, path):
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="No space left"):
        checkpointer.save("a")
    assert (tmp_path / "a.pth").read_bytes() == content
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pth", "last_checkpoint"]


def test_torchvisions_resnet_complete(model, tmp_path, caplog):
    source = torchvision.models.resnet18(weights=None)
    torch.save(source.state_dict(), tmp_path / "r18.pth")
    with caplog.at_level(logging.INFO, logger="fcos_d2"):
        FCOSCheckpointer(frozen(model)).load(str(tmp_path / "r18.pth"), checkpointables=[])
    state = model.state_dict()
    assert torch.equal(state["backbone.bottom_up.stem.conv1.weight"], source.conv1.weight)
    assert torch.equal(
        state["backbone.bottom_up.res5.1.conv2.weight"], source.layer4[1].conv2.weight
    )
    assert "not used: fc.weight, fc.bias" in caplog.text
    assert "not in the file, so as they were initialised: none" in caplog.text


def test_torchvisions_resnet_partial(model, tmp_path, caplog):
    source = torchvision.models.resnet18(weights=None).state_dict()
    partial = {k: v for k, v in source.items() if not k.startswith("layer4.1.conv2")}
    torch.save(partial, tmp_path / "r18.pth")
    model = frozen(model)
    before = weights_of(model)
    with caplog.at_level(logging.INFO, logger="fcos_d2"):
        FCOSCheckpointer(model).load(str(tmp_path / "r18.pth"), checkpointables=[])
    missing = "backbone.bottom_up.res5.1.conv2.weight"
    assert torch.equal(model.state_dict()[missing], before[missing])
    assert "as they were initialised: res5.1.conv2.weight" in caplog.text
    assert "loaded res4: 25" in caplog.text


def frozen(model):
    """The model with FrozenBN in its ResNet, whose buffers torchvision's file fills."""
    from detectron2.layers import FrozenBatchNorm2d

    for module in list(model.backbone.bottom_up.modules()):
        for name, child in module.named_children():
            if isinstance(child, torch.nn.GroupNorm):
                setattr(module, name, FrozenBatchNorm2d(child.num_channels))
    return model


def test_torchvisions_resnet_of_another_depth(model, tmp_path):
    torch.save(torchvision.models.resnet50(weights=None).state_dict(), tmp_path / "r50.pth")
    with pytest.raises(ValueError, match="r50.pth is a torchvision ResNet of another shape"):
        FCOSCheckpointer(frozen(model)).load(str(tmp_path / "r50.pth"), checkpointables=[])


def test_other_classes_start_the_class_predictor_anew(model, tmp_path, caplog):
    FCOSCheckpointer(model, str(tmp_path), class_names=NAMES).save("a")
    path = str(tmp_path / "a.pth")
    with torch.no_grad():
        model.proposal_generator.head.cls_score.bias.fill_(3.0)
        model.proposal_generator.head.box_pred.bias.fill_(3.0)
    other = FCOSCheckpointer(model, class_names=["x", "y", "z"])
    other.load(path, checkpointables=[])
    assert (model.proposal_generator.head.cls_score.bias == 3.0).all()
    assert (model.proposal_generator.head.box_pred.bias == 0.0).all()
    assert "class predictor is left out" in caplog.text
    with pytest.raises(ValueError, match="(?s)trained on other classes.*circle, square.*x, y, z"):
        other.load(path)  # to resume
    with pytest.raises(ValueError, match="trained on other classes"):
        FCOSCheckpointer(model, class_names=["x", "y", "z"], for_inference=True).load(path)


def test_weights_without_a_head_do_not_detect(model, tmp_path):
    state = {k: v for k, v in model.state_dict().items() if k.startswith("backbone.")}
    torch.save({"model": state}, tmp_path / "backbone.pth")
    with pytest.raises(ValueError, match="backbone.pth holds no FCOS head"):
        FCOSCheckpointer(model, for_inference=True).load(str(tmp_path / "backbone.pth"))
    with pytest.raises(ValueError, match="MODEL.WEIGHTS is empty"):
        FCOSCheckpointer(model, for_inference=True).load("")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 truncated"])
def test_a_file_that_is_no_checkpoint(model, tmp_path, content):
    (tmp_path / "bad.pth").write_bytes(content)
    with pytest.raises(ValueError, match="bad.pth can't be read as a checkpoint"):
        FCOSCheckpointer(model).load(str(tmp_path / "bad.pth"))


def test_a_truncated_checkpoint(model, tmp_path):
    FCOSCheckpointer(model, str(tmp_path)).save("a")
    whole = (tmp_path / "a.pth").read_bytes()
    (tmp_path / "a.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="a.pth can't be read as a checkpoint"):
        FCOSCheckpointer(model).load(str(tmp_path / "a.pth"))


def test_a_file_that_is_not_there(model, tmp_path):
    with pytest.raises(FileNotFoundError, match="MODEL.WEIGHTS .*nowhere.pth can't be had"):
        FCOSCheckpointer(model).load(str(tmp_path / "nowhere.pth"))


def test_another_network_does_not_detect_or_resume(model, tmp_path):
    FCOSCheckpointer(model, str(tmp_path)).save("a")
    path = str(tmp_path / "a.pth")
    model.proposal_generator.head.box_tower = torch.nn.Conv2d(64, 32, 3)
    message = r"a\.pth is of another network: 2 tensors .*box_tower\.bias, .*box_tower\.weight"
    with pytest.raises(ValueError, match=message):
        FCOSCheckpointer(model, for_inference=True).load(path)
    with pytest.raises(ValueError, match=message):
        FCOSCheckpointer(model).load(path)
    FCOSCheckpointer(model).load(path, checkpointables=[])  # to start from


def test_a_file_of_which_nothing_fits(model, tmp_path):
    torch.save({"somebody.elses.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth holds nothing that has a place"):
        FCOSCheckpointer(model).load(str(tmp_path / "other.pth"), checkpointables=[])
