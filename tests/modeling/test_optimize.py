"""A model made ready for inference detects what the model it was made from does.

And MODEL.CHANNELS_LAST, the part of it that training has too.
"""

import copy
import functools
import os
import re

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances, pairwise_iou
from detectron2.utils.events import EventStorage
from torch import nn

from fcos_d2 import optimize_for_inference
from fcos_d2.engine import Trainer
from fcos_d2.modeling import optimize

BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d)


def make_input(height=96, width=128, boxes=()):
    inputs = {"image": torch.randint(0, 256, (3, height, width), dtype=torch.uint8)}
    if boxes:
        inputs["instances"] = Instances((height, width))
        inputs["instances"].gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32))
        inputs["instances"].gt_classes = torch.arange(len(boxes)) % 3
    return inputs


def make_model(cfg):
    """A model in eval mode that detects something, with the statistics of a trained one."""
    cfg.MODEL.FCOS.NMS_THRESH_TEST = 0.95  # what is found in noise, NMS would thin by chance
    cfg.TEST.DETECTIONS_PER_IMAGE = 300
    model = build_model(cfg).eval()
    head = model.proposal_generator.head
    nn.init.normal_(head.cls_score.weight, std=0.2)
    nn.init.constant_(head.cls_score.bias, -1.0)
    nn.init.normal_(head.box_pred.weight, std=0.1)
    nn.init.constant_(head.box_pred.bias, 1.5)
    for module in model.modules():
        if isinstance(module, BATCH_NORMS):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.8, 1.2)
            nn.init.uniform_(module.weight.data, 0.7, 1.3)
            nn.init.normal_(module.bias.data, std=0.1)
        elif isinstance(module, nn.GroupNorm):
            nn.init.normal_(module.bias, std=0.1)
    return model


@torch.no_grad()
def raw(model, inputs):
    """Logits, distances and quality of the head."""
    images = model.preprocess_image([inputs])
    return model.proposal_generator.predict(images, model.backbone(images.tensor))[1:]


@torch.no_grad()
def detect(model, inputs):
    return model([inputs])[0]["instances"]


def assert_found(ours, reference, overlap, score):
    """Each reference has one of ours; equal scores may have changed places."""
    same_class = reference.pred_classes[:, None] == ours.pred_classes
    best, match = (pairwise_iou(reference.pred_boxes, ours.pred_boxes) * same_class).max(dim=1)
    assert best.min() > overlap
    assert (ours.scores[match] - reference.scores).abs().max() < score


def relative_error(ours, reference):
    return ((ours - reference).abs().max() / reference.abs().max()).item()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    "backbone_norm, head_norm", [("FrozenBN", "GN"), ("BN", "BN"), ("SyncBN", "naiveSyncBN")]
)
def test_folded_model_gives_the_same(tiny_cfg, backbone_norm, head_norm, channels_last):
    tiny_cfg.MODEL.RESNETS.NORM = tiny_cfg.MODEL.FPN.NORM = backbone_norm
    tiny_cfg.MODEL.FCOS.NORM = head_norm
    tiny_cfg.MODEL.FCOS.NUM_SHARED_CONVS = 1
    model = make_model(tiny_cfg)
    before = copy.deepcopy(model.state_dict())
    # It may be called in the middle of training.
    model.train()
    optimized = optimize_for_inference(model, channels_last=channels_last)
    assert model.training
    model.eval()
    assert any(isinstance(x, BATCH_NORMS) for x in model.modules())
    assert not any(isinstance(x, BATCH_NORMS) for x in optimized.modules())
    assert not any(x.training for x in optimized.modules())
    assert not any(p.requires_grad for p in optimized.parameters())

    for inputs in (make_input(), make_input(61, 200)):
        for ours, reference in zip(raw(optimized, inputs), raw(model, inputs), strict=True):
            assert relative_error(ours, reference) < 1e-4
        ours, reference = detect(optimized, inputs), detect(model, inputs)
        assert len(ours) == len(reference) > 50
        assert_found(ours, reference[:-5], overlap=0.999, score=1e-4)

    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert all(p.requires_grad for p in model.proposal_generator.head.parameters())


def test_every_level_gets_the_convolution_of_its_own_norm(tiny_cfg):
    """By hand: conv(x) * a + b with a = weight / sqrt(var + eps), b = bias - mean * a."""
    tiny_cfg.MODEL.FCOS.NORM = "BN"
    model = make_model(tiny_cfg)
    conv, norms, _ = model.proposal_generator.head.cls_tower
    folded, _ = optimize_for_inference(model).proposal_generator.head.cls_tower
    assert len(folded) == len(norms) == 5
    x = torch.randn(1, 64, 6, 5)
    for norm, ours in zip(norms, folded, strict=True):
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        shift = norm.bias - norm.running_mean * scale
        expected = conv(x) * scale[:, None, None] + shift[:, None, None]
        torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-5)


def test_batch_norms_can_stay(tiny_cfg):
    tiny_cfg.MODEL.FCOS.NORM = "BN"
    model = make_model(tiny_cfg)
    optimized = optimize_for_inference(model, channels_last=False, fold_bn=False)
    inputs = make_input()
    for ours, reference in zip(raw(optimized, inputs), raw(model, inputs), strict=True):
        assert torch.equal(ours, reference)
    assert optimized.state_dict().keys() == model.state_dict().keys()


def test_batch_norm_without_statistics_stays(tiny_cfg):
    model = make_model(tiny_cfg)
    model.backbone.bottom_up.stem.conv1.norm = nn.BatchNorm2d(64, track_running_stats=False)
    optimized = optimize_for_inference(model)
    kept = [name for name, x in optimized.named_modules() if isinstance(x, BATCH_NORMS)]
    assert kept == ["backbone.bottom_up.stem.conv1.norm"]
    inputs = make_input()
    for ours, reference in zip(raw(optimized, inputs), raw(model, inputs), strict=True):
        assert relative_error(ours, reference) < 1e-4


@pytest.mark.parametrize("norm", ["GN", "BN"])
@pytest.mark.parametrize("options", [{}, {"QUALITY": "none", "USE_SCALE": True}])
def test_bfloat16_detects_nearly_the_same(tiny_cfg, norm, options):
    tiny_cfg.MODEL.FCOS.NORM = norm
    tiny_cfg.MODEL.FCOS.merge_from_list([x for pair in options.items() for x in pair])
    model = make_model(tiny_cfg)
    optimized = optimize_for_inference(model, torch.bfloat16)
    head = optimized.proposal_generator.head
    assert {p.dtype for p in optimized.backbone.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in head.cls_tower.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in head.cls_score.parameters()} == {torch.float32}
    inputs = make_input()
    outputs = [x for x in raw(optimized, inputs) if x is not None]
    assert outputs[0].dtype == torch.float32  # class logits
    for ours, reference in zip(outputs, raw(model, inputs), strict=False):
        assert relative_error(ours, reference) < 0.1

    reference = detect(model, inputs)[:30]
    assert len(reference) == 30
    assert_found(detect(optimized, inputs), reference, overlap=0.8, score=0.05)


def test_feature_maps_are_channels_last(tiny_cfg):
    """From a plain image: the first convolution turns it."""
    optimized = optimize_for_inference(make_model(tiny_cfg), torch.bfloat16)
    with torch.no_grad():
        features = optimized.backbone(torch.randn(1, 3, 96, 128))
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in features.values())
    assert not any(x.is_contiguous() for x in features.values() if x.shape[2] > 1)


def test_it_can_be_copied_and_saved(tiny_cfg, tmp_path):
    optimized = optimize_for_inference(make_model(tiny_cfg), torch.bfloat16)
    inputs = make_input()
    expected = detect(optimized, inputs).scores
    torch.save(optimized, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    for other in (copy.deepcopy(optimized), loaded):
        assert torch.equal(detect(other, inputs).scores, expected)


@pytest.mark.parametrize("meta_arch", ["GeneralizedRCNN", "ProposalNetwork"])
def test_other_meta_architectures(tiny_cfg, meta_arch):
    tiny_cfg.MODEL.META_ARCHITECTURE = meta_arch
    tiny_cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    tiny_cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p3", "p4", "p5"]
    tiny_cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3
    tiny_cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    tiny_cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 7
    tiny_cfg.MODEL.ROI_BOX_HEAD.NUM_CONV = 1
    tiny_cfg.MODEL.ROI_BOX_HEAD.CONV_DIM = 32
    tiny_cfg.MODEL.ROI_BOX_HEAD.NORM = "BN"
    tiny_cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 20
    tiny_cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    model = make_model(tiny_cfg)
    optimized = optimize_for_inference(model)
    assert not any(isinstance(x, BATCH_NORMS) for x in optimized.modules())
    inputs = make_input()
    with torch.no_grad():
        (ours,), (reference,) = optimized([inputs])[0].values(), model([inputs])[0].values()
    assert len(ours) == len(reference) > 10
    for name in ("scores", "objectness_logits"):
        if reference.has(name):
            torch.testing.assert_close(ours.get(name), reference.get(name), rtol=1e-3, atol=1e-4)
    if meta_arch == "GeneralizedRCNN":
        with pytest.raises(ValueError, match="ROI heads of GeneralizedRCNN need .* 'float32'"):
            optimize_for_inference(model, torch.bfloat16)
    else:
        with torch.no_grad():
            assert len(optimize_for_inference(model, torch.bfloat16)([inputs])[0]["proposals"])


def test_what_can_not_be_optimized(tiny_cfg, monkeypatch, caplog):
    model = build_model(tiny_cfg)
    with pytest.raises(ValueError, match="Linear cannot be optimized"):
        optimize_for_inference(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="DataParallel cannot be optimized .* Pass `.module`"):
        optimize_for_inference(nn.DataParallel(model))
    with pytest.raises(ValueError, match=r"dtype is torch.float64, not one of"):
        optimize_for_inference(model, torch.float64)
    with pytest.raises(ValueError, match="'float16' needs CUDA, but the model is on the cpu"):
        optimize_for_inference(model, torch.float16)
    for features, expected in [
        ({"avx512_bf16": False, "avx512_f": True}, ["This cpu has no bfloat16 instructions"]),
        ({"avx512_bf16": False, "amx_bf16": True}, []),
    ]:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda x=features: x, raising=False)
        caplog.clear()
        optimize_for_inference(model, torch.bfloat16)
        assert [x.getMessage().split(":")[0] for x in caplog.records] == expected


# Inductor takes a minute or more; that the model can be traced once for all sizes is tested anyway.
BACKENDS = ["eager"] + ["inductor"] * ("FCOS_D2_TEST_COMPILE" in os.environ)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"), reason="needs PyTorch 2.6")
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_once_for_all_sizes(tiny_cfg, monkeypatch, backend):
    model = make_model(tiny_cfg)
    if backend != "inductor":
        monkeypatch.setattr(optimize, "_check_compiler", lambda device: None)
        monkeypatch.setattr(
            nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend=backend)
        )
    torch.compiler.reset()
    optimized = optimize_for_inference(model, compile=True)
    first, second = make_input(192, 256), make_input(200, 250)
    with torch.compiler.set_stance("fail_on_recompile"), pytest.raises(RuntimeError):
        raw(optimized, first)  # nothing is compiled yet: this shows that it is going to be
    raw(optimized, first)
    with torch.compiler.set_stance("fail_on_recompile"):
        for inputs in (first, second):
            for ours, reference in zip(raw(optimized, inputs), raw(model, inputs), strict=True):
                assert relative_error(ours, reference) < 1e-4
            assert len(detect(optimized, inputs)) == len(detect(model, inputs)) > 50


def test_without_a_compiler(tiny_cfg, monkeypatch):
    def no_compiler(function):
        raise OSError("No working C++ compiler found")

    monkeypatch.setattr(torch, "compile", no_compiler)
    with pytest.raises(RuntimeError, match=r"(?s)TEST.OPTIMIZE .* C\+\+ compiler .* No working"):
        optimize_for_inference(build_model(tiny_cfg), compile=True)


def test_config_keys(tiny_cfg):
    assert optimize.inference_options(tiny_cfg) is None
    tiny_cfg.TEST.OPTIMIZE = "bfloat16"
    assert optimize.inference_options(tiny_cfg) == {"dtype": torch.bfloat16, "compile": False}
    tiny_cfg.TEST.OPTIMIZE = "bfloat16+compile"
    assert optimize.inference_options(tiny_cfg) == {"dtype": torch.bfloat16, "compile": True}
    for value in ("fp16", "none+compile", "bfloat16+", "compile"):
        tiny_cfg.TEST.OPTIMIZE = value
        message = f"TEST.OPTIMIZE is '{re.escape(value)}': set it to 'none' or one of"
        with pytest.raises(ValueError, match=message):
            optimize.inference_options(tiny_cfg)


def train(model, batch):
    """Losses and gradients by name."""
    with EventStorage():
        losses = model(batch)
    sum(losses.values()).backward()
    named = getattr(model, "module", model).named_parameters()
    return losses, {name: p.grad for name, p in named if p.requires_grad}


def kernels(model):
    """Weights whose memory formats differ."""
    weights = [p for p in model.parameters() if p.dim() == 4 and p.shape[2] > 1 and p.shape[1] > 1]
    assert len(weights) > 20
    return weights


@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("norm", ["GN", "BN"])
def test_channels_last_trains_the_same(tiny_cfg, tmp_path, norm, distributed):
    """Also after a checkpoint of the other format was loaded, and wrapped for several processes."""
    tiny_cfg.MODEL.FCOS.NORM = norm
    # In float64: in float32 a ReLU whose input rounds to the other side of 0 has another gradient.
    plain = Trainer.build_model(tiny_cfg).double()
    torch.save(plain.state_dict(), tmp_path / "weights.pth")
    tiny_cfg.MODEL.CHANNELS_LAST = True
    model = Trainer.build_model(tiny_cfg).double()
    model.load_state_dict(torch.load(tmp_path / "weights.pth"))
    batch = [
        make_input(96, 128, [[10, 20, 60, 70], [64, 8, 120, 90]]),
        make_input(80, 96, [[5, 5, 40, 60]]),
    ]
    expected_losses, expected = train(plain, batch)
    if distributed:
        torch.distributed.init_process_group(
            "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
        )
        try:
            wrapped = nn.parallel.DistributedDataParallel(model)
            losses, gradients = train(wrapped, batch)
        finally:
            torch.distributed.destroy_process_group()
    else:
        losses, gradients = train(model, batch)
    for name, loss in losses.items():
        torch.testing.assert_close(loss, expected_losses[name], rtol=1e-9, atol=1e-12)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-9 * scale + 1e-14)
    assert not any(w.is_contiguous(memory_format=torch.channels_last) for w in kernels(plain))
    for weight in kernels(model):
        assert weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("freeze_at", [0, 2])
def test_no_graph_is_recorded_for_frozen_stages(tiny_cfg, freeze_at, channels_last):
    """FREEZE_AT 2 is the stem and res2: what comes into res3 has nothing to go back to."""
    tiny_cfg.MODEL.BACKBONE.FREEZE_AT = freeze_at
    tiny_cfg.MODEL.CHANNELS_LAST = channels_last
    model = Trainer.build_model(tiny_cfg)
    bottom_up = model.backbone.bottom_up
    seen = []
    bottom_up.res3.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    _, gradients = train(model, [make_input(96, 128, [[10, 20, 60, 70]])])
    (feature,) = seen
    assert (feature.grad_fn is None) == (not feature.requires_grad) == (freeze_at == 2)
    frozen = [p.grad is None for x in (bottom_up.stem, bottom_up.res2) for p in x.parameters()]
    assert frozen and all(x == (freeze_at == 2) for x in frozen)
    assert all(x is not None and x.isfinite().all() for x in gradients.values())
