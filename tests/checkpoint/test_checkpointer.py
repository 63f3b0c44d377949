"""`FCOSCheckpointer`: files that it writes, reads and refuses."""

import os
import pickle
import re

import pytest
import torch
import torchvision
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model

from fcos_d2.checkpoint import FACT_KEYS, FCOSCheckpointer, convert, read_info
from fcos_d2.checkpoint.architecture import build_cfg
from fcos_d2.checkpoint.keys import is_setting, state_facts

NAMES = ["circle", "square", "star"]


@pytest.fixture
def model(tiny_cfg):
    return build_model(tiny_cfg)


def weights_of(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def set_to_zero(model):
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)


def assert_same_weights(one, other):
    assert one.keys() == other.keys()
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=0, atol=0)


def test_class_names_are_saved(model, tmp_path):
    FCOSCheckpointer(model, str(tmp_path), class_names=NAMES).save("model_final", iteration=7)
    path = str(tmp_path / "model_final.pth")
    assert read_info(path)[:2] == (NAMES, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last_checkpoint", "model_final.pth"]
    before = weights_of(model)
    set_to_zero(model)
    extra = FCOSCheckpointer(model, class_names=NAMES).load(path)
    assert extra["iteration"] == 7
    assert_same_weights(weights_of(model), before)
    set_to_zero(model)
    DetectionCheckpointer(model).load(path)
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


@pytest.fixture
def resnet_cfg(tiny_cfg):
    """With FrozenBN in the ResNet, whose buffers torchvision's file fills."""
    tiny_cfg.MODEL.RESNETS.NORM = "FrozenBN"
    return tiny_cfg


@pytest.mark.parametrize(
    ("prefix", "log"),
    [
        ("nothing", "Loaded 100 tensors.* Not used: fc.weight, fc.bias.*initialised: none"),
        ("layer4.1.conv2", "Loaded 99 tensors.*initialised: res5.1.conv2.weight"),
    ],
)
def test_torchvisions_resnet(resnet_cfg, tmp_path, info_log, prefix, log):
    """Complete, and without the tensors whose names start with ``prefix``."""
    source = torchvision.models.resnet18(weights=None).state_dict()
    torch.save({k: v for k, v in source.items() if not k.startswith(prefix)}, tmp_path / "r18.pth")
    model = build_model(resnet_cfg)
    before = weights_of(model)
    FCOSCheckpointer(model).load(str(tmp_path / "r18.pth"), checkpointables=[])
    state, ours = model.state_dict(), "backbone.bottom_up."
    assert torch.equal(state[f"{ours}stem.conv1.weight"], source["conv1.weight"])
    last = (
        before[f"{ours}res5.1.conv2.weight"]
        if "conv2" in prefix
        else source["layer4.1.conv2.weight"]
    )
    assert torch.equal(state[f"{ours}res5.1.conv2.weight"], last)
    assert re.search(log, info_log.text, re.DOTALL)


def test_torchvisions_resnet_in_a_model_that_ends_with_layer3(resnet_cfg, tmp_path, info_log):
    resnet_cfg.MODEL.RESNETS.OUT_FEATURES = resnet_cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4"]
    resnet_cfg.MODEL.FCOS.TOP_BLOCK_IN_FEATURE = "p4"
    model = build_model(resnet_cfg)
    source = torchvision.models.resnet18(weights=None).state_dict()
    torch.save(source, tmp_path / "r18.pth")
    FCOSCheckpointer(model).load(str(tmp_path / "r18.pth"), checkpointables=[])
    loaded = model.state_dict()["backbone.bottom_up.res4.1.conv2.weight"]
    assert torch.equal(loaded, source["layer3.1.conv2.weight"])
    assert "Not used: layer4.0.conv1.weight, " in info_log.text


def test_torchvisions_resnet_of_another_depth(resnet_cfg, tmp_path):
    torch.save(torchvision.models.resnet50(weights=None).state_dict(), tmp_path / "r50.pth")
    model = build_model(resnet_cfg)
    with pytest.raises(ValueError, match="r50.pth is a torchvision ResNet of another shape"):
        FCOSCheckpointer(model).load(str(tmp_path / "r50.pth"), checkpointables=[])


def test_other_classes_reset_the_class_predictor(model, tmp_path, caplog):
    FCOSCheckpointer(model, str(tmp_path), class_names=NAMES).save("a")
    path = str(tmp_path / "a.pth")
    with torch.no_grad():
        model.proposal_generator.head.cls_score.bias.fill_(3.0)
        model.proposal_generator.head.box_pred.bias.fill_(3.0)
    other = FCOSCheckpointer(model, class_names=["x", "y", "z"])
    other.load(path, checkpointables=[])
    assert (model.proposal_generator.head.cls_score.bias == 3.0).all()
    assert (model.proposal_generator.head.box_pred.bias == 0.0).all()
    assert "class predictor is not loaded" in caplog.text
    with pytest.raises(ValueError, match="(?s)trained on other classes.*circle, square.*x, y, z"):
        other.load(path)  # to resume
    with pytest.raises(ValueError, match="trained on other classes"):
        FCOSCheckpointer(model, class_names=["x", "y", "z"], for_inference=True).load(path)


def test_weights_without_a_head_do_not_detect(model, tmp_path):
    state = {k: v for k, v in model.state_dict().items() if k.startswith("backbone.")}
    torch.save({"model": state}, tmp_path / "backbone.pth")
    with pytest.raises(ValueError, match="backbone.pth has no FCOS head"):
        FCOSCheckpointer(model, for_inference=True).load(str(tmp_path / "backbone.pth"))
    with pytest.raises(ValueError, match="MODEL.WEIGHTS is empty"):
        FCOSCheckpointer(model, for_inference=True).load("")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 truncated", None])
def test_a_file_that_is_not_a_checkpoint(model, tmp_path, content):
    """None is a truncated checkpoint."""
    path = tmp_path / "bad.pth"
    if content is None:
        FCOSCheckpointer(model, str(tmp_path)).save("bad")
        content = path.read_bytes()[: path.stat().st_size // 2]
    path.write_bytes(content)
    with pytest.raises(ValueError, match="bad.pth can't be read as a checkpoint"):
        FCOSCheckpointer(model).load(str(path))
    with pytest.raises(FileNotFoundError, match="MODEL.WEIGHTS .*nowhere.pth could not be loaded"):
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


def test_a_file_without_a_tensor_that_fits(model, tmp_path):
    torch.save({"somebody.elses.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth has no tensor that fits"):
        FCOSCheckpointer(model).load(str(tmp_path / "other.pth"), checkpointables=[])


@pytest.fixture
def foreign(make_state, tmp_path):
    """A checkpoint of AdelaiDet, its keys and weights as they are converted, and our model."""
    state = make_state("adelaidet", num_classes=3)
    torch.save({"model": state, "iteration": 9}, tmp_path / "foreign.pth")
    converted = convert(state)
    cfg = build_cfg(converted.cfg, num_classes=3)
    cfg.MODEL.DEVICE = "cpu"
    return str(tmp_path / "foreign.pth"), converted, build_model(cfg)


@pytest.mark.parametrize("for_inference", [True, False])
def test_another_librarys_fcos_is_read_as_it_is(foreign, for_inference, info_log):
    path, converted, model = foreign
    left = FCOSCheckpointer(model, for_inference=for_inference).load(path)
    assert_same_weights(weights_of(model), converted.weights)
    (record,) = [r for r in info_log.records if "is of adelaidet" in r.message]
    assert "cls_tower" in record.message and "STRIDE_IN_1X1" in record.message
    assert "iteration" not in left  # another library's count, and nothing to go on from


def test_another_librarys_fcos_to_start_training_from(foreign, tiny_cfg):
    """In a network with another FPN and head the tensors that fit are loaded."""
    path, converted, _ = foreign
    tiny_cfg.MODEL.FPN.OUT_CHANNELS = 32
    model = build_model(tiny_cfg)
    before = weights_of(model)
    FCOSCheckpointer(model, class_names=NAMES).load(path, checkpointables=[])
    after = weights_of(model)
    assert state_facts(after) == state_facts(converted.weights)
    before, after = ({k: v for k, v in x.items() if not is_setting(k)} for x in (before, after))
    shapes = {k: v.shape for k, v in converted.weights.items()}
    fits = {k for k, v in after.items() if shapes.get(k) == v.shape}
    assert "backbone.bottom_up.res5.1.conv2.weight" in fits
    assert "proposal_generator.head.cls_tower.0.weight" not in fits
    assert_same_weights({k: after[k] for k in fits}, {k: converted.weights[k] for k in fits})
    rest = after.keys() - fits
    assert_same_weights({k: after[k] for k in rest}, {k: before[k] for k in rest})


def test_cocos_classes_in_another_librarys_file(make_state, tmp_path):
    """torchvision's 91 outputs have names: training on other classes begins a new predictor."""
    state = make_state("torchvision", num_classes=91)
    torch.save(state, tmp_path / "coco.pth")
    cfg = build_cfg(convert(state).cfg, num_classes=80)
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg)
    before = weights_of(model)
    path = str(tmp_path / "coco.pth")
    FCOSCheckpointer(model, class_names=[str(k) for k in range(80)]).load(path, checkpointables=[])
    after = weights_of(model)
    score, box = (f"proposal_generator.head.{name}.weight" for name in ("cls_score", "box_pred"))
    assert torch.equal(after[score], before[score]) and not torch.equal(after[box], before[box])
    with pytest.raises(ValueError, match="(?s)trained on other classes.*person, bicycle"):
        FCOSCheckpointer(model, class_names=NAMES, for_inference=True).load(path)


def test_another_librarys_fcos_must_be_complete(foreign, make_state):
    path, _, model = foreign
    state = make_state("adelaidet")
    del state["proposal_generator.fcos_head.bbox_pred.bias"]
    torch.save(state, path)
    with pytest.raises(
        ValueError, match=r"foreign\.pth: 1 tensor\(s\) do not fit.*\n.*bbox_pred\.bias"
    ):
        FCOSCheckpointer(model).load(path, checkpointables=[])


def test_arrays_in_detectron2s_zoo_format(foreign, make_state, tmp_path):
    _, converted, model = foreign
    arrays = {name: x.numpy() for name, x in make_state("adelaidet").items()}
    path = tmp_path / "foreign.pkl"
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "somebody"}))
    FCOSCheckpointer(model, for_inference=True).load(str(path))
    assert_same_weights(weights_of(model), converted.weights)


def test_a_backbone_in_detectron2s_zoo_format(model, tmp_path):
    """As in its ImageNet weights: names without the model's prefix, matched by Detectron2."""
    prefix = "backbone.bottom_up."
    state = {k: v for k, v in weights_of(model).items() if k.startswith(prefix)}
    arrays = {k.removeprefix(prefix): v.numpy() + 1 for k, v in state.items()}
    content = {"model": arrays, "__author__": "torchvision", "matching_heuristics": True}
    (tmp_path / "R.pkl").write_bytes(pickle.dumps(content))
    FCOSCheckpointer(model).load(str(tmp_path / "R.pkl"), checkpointables=[])
    after = weights_of(model)
    assert len(state) > 50
    for key, value in state.items():
        assert torch.equal(after[key], value + 1), key


@pytest.mark.parametrize("suffix", [".pth", ".pkl", ".pyth"])
def test_unsafe_pickles_are_refused(model, tmp_path, suffix):
    path, ran = tmp_path / f"evil{suffix}", tmp_path / "ran"

    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(ran),)

    path.write_bytes(pickle.dumps({"model": {"a": Trap()}, "__author__": "x"}, protocol=2))
    for options in ({}, {"checkpointables": []}):
        with pytest.raises(ValueError, match=rf"evil\{suffix} is refused"):
            FCOSCheckpointer(model).load(str(path), **options)
    assert not ran.exists()


def test_a_state_dict_of_a_parallel_model(model, tmp_path):
    before = weights_of(model)
    torch.save({f"module.{k}": v for k, v in before.items()}, tmp_path / "a.pth")
    set_to_zero(model)
    FCOSCheckpointer(model, for_inference=True).load(str(tmp_path / "a.pth"))
    assert_same_weights(weights_of(model), before)


def test_a_two_stage_model_saves_and_loads(tiny_cfg, tmp_path):
    """Its proposal generator is ours; its ROI heads go along."""
    tiny_cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    tiny_cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p3", "p4", "p5"]
    tiny_cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3
    tiny_cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    tiny_cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    tiny_cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 1
    tiny_cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 16
    tiny_cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 2
    model = build_model(tiny_cfg)
    FCOSCheckpointer(model, str(tmp_path), class_names=NAMES, cfg=tiny_cfg).save("a")
    before = weights_of(model)
    assert any(key.startswith("roi_heads.") for key in before)
    set_to_zero(model)
    path = str(tmp_path / "a.pth")
    FCOSCheckpointer(model, class_names=NAMES, for_inference=True).load(path)
    assert_same_weights(weights_of(model), before)
    # Its ROI heads have keys of their own: no recipe is turned into it by the keys of the weights.
    assert read_info(path).cfg.keys() == set(FACT_KEYS)
