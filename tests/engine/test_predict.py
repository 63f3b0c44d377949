"""The predictor and what `demo.py` does with it."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from detectron2.utils.visualizer import Visualizer
from PIL import Image
from torchvision.models.detection import FCOS
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from fcos_d2.checkpoint import FCOSCheckpointer, convert_file
from fcos_d2.engine import evaluate, setup
from fcos_d2.engine.predict import (
    Predictor,
    above_threshold,
    expand_inputs,
    predict_images,
    predict_video,
)

NAMES = ["circle", "square", "star"]


@pytest.fixture
def cfg(tiny_cfg, tmp_path):
    """A config whose checkpoint finds something: random weights with a high class bias."""
    model = build_model(tiny_cfg)
    torch.nn.init.constant_(model.proposal_generator.head.cls_score.bias, 1.0)
    torch.nn.init.constant_(model.proposal_generator.head.box_pred.bias, 1.0)
    FCOSCheckpointer(model, str(tmp_path), class_names=NAMES).save("model")
    tiny_cfg.MODEL.WEIGHTS = str(tmp_path / "model.pth")
    tiny_cfg.MODEL.FCOS.NUM_CLASSES = -1
    tiny_cfg.TEST.DETECTIONS_PER_IMAGE = 8  # drawing is slow
    tiny_cfg.DATASETS.TRAIN = tiny_cfg.DATASETS.TEST = ()
    return tiny_cfg


@pytest.fixture
def image():
    """Noise, BGR."""
    return np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for k in range(3):
        pixels = np.random.default_rng(k).integers(0, 255, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{k}.jpg")
    return folder


def test_class_names_and_their_number_come_from_the_checkpoint(cfg):
    predictor = Predictor(cfg)
    assert predictor.metadata.thing_classes == NAMES
    assert predictor.cfg.MODEL.FCOS.NUM_CLASSES == 3


def test_equals_detectron2s_predictor(cfg, image):
    ours = Predictor(cfg)(image)["instances"]
    cfg.MODEL.FCOS.NUM_CLASSES = 3
    theirs = DefaultPredictor(cfg)(image)["instances"]
    assert len(ours) > 0
    assert torch.equal(ours.pred_boxes.tensor, theirs.pred_boxes.tensor)
    assert torch.equal(ours.scores, theirs.scores)


def test_keys_of_the_checkpoint_override_the_recipe(cfg, tmp_path):
    """The recipe has no scales; keys set by hand are kept."""
    made_for = cfg.clone()
    made_for.MODEL.FCOS.NUM_CLASSES = 5
    made_for.MODEL.FCOS.USE_SCALE = True
    made_for.MODEL.PIXEL_MEAN = [1.0, 2.0, 3.0]
    FCOSCheckpointer(build_model(made_for), str(tmp_path), cfg=made_for).save("other")
    cfg.MODEL.WEIGHTS = str(tmp_path / "other.pth")
    predictor = Predictor(cfg)
    assert predictor.model.proposal_generator.head.scales is not None
    assert predictor.cfg.MODEL.PIXEL_MEAN == [1.0, 2.0, 3.0]
    assert predictor.metadata.thing_classes == ["0", "1", "2", "3", "4"]  # nobody named them
    by_hand = Predictor(cfg, keep=["MODEL.PIXEL_MEAN"])
    assert by_hand.cfg.MODEL.PIXEL_MEAN == cfg.MODEL.PIXEL_MEAN


@pytest.fixture
def torchvision_fcos(tmp_path):
    """torchvision's own FCOS on a ResNet-18, random but for a bias that lets it detect."""
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18",
        weights=None,
        norm_layer=torch.nn.BatchNorm2d,
        returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(256, 256),
    )
    model = FCOS(backbone, num_classes=4, min_size=60, max_size=853)
    torch.nn.init.normal_(model.head.classification_head.cls_logits.bias, mean=-1.0)
    torch.nn.init.constant_(model.head.classification_head.cls_logits.bias[0], -99.0)
    torch.nn.init.uniform_(model.head.regression_head.bbox_reg.bias, 1.0, 2.0)
    torch.save({"model": model.state_dict()}, tmp_path / "torchvision.pth")
    return model.eval()


@pytest.mark.parametrize("converted", [False, True])
def test_torchvisions_weights_detect_the_same_without_a_hand_set_option(
    cfg, torchvision_fcos, tmp_path, converted, image
):
    """From a recipe that differs in nearly every key of the model."""
    path = tmp_path / "torchvision.pth"
    if converted:
        convert_file(path, tmp_path / "converted.pth", class_names=NAMES)
        path = tmp_path / "converted.pth"
    cfg.MODEL.WEIGHTS = str(path)
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 60, 853
    predictor = Predictor(cfg)
    ours = predictor(image)["instances"]
    with torch.no_grad():
        rgb = torch.from_numpy(image[:, :, ::-1].copy()).permute(2, 0, 1) / 255
        (theirs,) = torchvision_fcos([rgb])
    assert len(ours) == len(theirs["labels"]) == 100
    assert torch.equal(ours.pred_classes, theirs["labels"] - int(converted))
    torch.testing.assert_close(ours.pred_boxes.tensor, theirs["boxes"], rtol=0, atol=0.01)
    torch.testing.assert_close(ours.scores, theirs["scores"], rtol=0, atol=1e-5)
    named = NAMES if converted else ["0", "1", "2", "3"]
    assert predictor.metadata.thing_classes == named


def test_images_are_drawn_and_a_bad_one_is_skipped(cfg, images, tmp_path, caplog):
    (images / "bad.jpg").write_bytes(b"no image")
    paths = expand_inputs([str(images)])
    assert [p.name for p in paths] == ["0.jpg", "1.jpg", "2.jpg", "bad.jpg"]
    written = predict_images(Predictor(cfg), paths, tmp_path / "out", 0.3)
    assert [p.name for p in written] == ["0.png", "1.png", "2.png"]
    assert "bad.jpg: it can't be read as an image" in caplog.text
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["0.png", "1.png", "2.png"]
    drawn, original = cv2.imread(str(written[0])), cv2.imread(str(images / "0.jpg"))
    assert drawn.shape == original.shape and (drawn != original).any()


def test_nothing_above_the_threshold_draws_nothing(cfg, images, tmp_path):
    (written,) = predict_images(Predictor(cfg), [images / "0.jpg"], tmp_path / "out", 0.999)
    original = cv2.imread(str(images / "0.jpg"))[:, :, ::-1]
    # Not the original itself: matplotlib 3.10 shifts some rows of an image of this size by one.
    plain = Visualizer(original).get_output().get_image()
    assert np.array_equal(cv2.imread(str(written))[:, :, ::-1], plain)


@pytest.mark.parametrize("wanted, expected", [(0.1, 0.1), (0.6, 0.4)])
def test_score_threshold_lowers_that_of_the_model(cfg, wanted, expected):
    cfg.MODEL.FCOS.SCORE_THRESH_TEST = 0.4
    predictor = Predictor(cfg, score_threshold=wanted)
    assert predictor.model.proposal_generator.decoder.score_thresh == expected


def test_threshold_is_on_the_drawn_score(cfg, images):
    instances = Predictor(cfg)(cv2.imread(str(images / "0.jpg")))["instances"]
    threshold = instances.scores.median().item()
    kept = above_threshold(instances, threshold)
    assert 0 < len(kept) < len(instances)
    assert kept.scores.min() >= threshold


def test_equal_names_from_two_folders_do_not_overwrite(cfg, images, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "0.png").write_bytes((images / "0.jpg").read_bytes())
    paths = expand_inputs([str(images / "0.jpg"), str(other)])
    written = predict_images(Predictor(cfg), paths, tmp_path / "out", 0.5)
    assert [p.name for p in written] == ["0.png", "0_2.png"]


def test_patterns(images):
    (images / "notes.txt").write_text("no image")
    pattern = str(images / "*")
    assert len(expand_inputs([pattern, str(images / "1.jpg")])) == 3
    with pytest.raises(FileNotFoundError, match=r"--input .*\*\.gif"):
        expand_inputs([str(images / "*.gif")])


def test_video(cfg, tmp_path):
    path = str(tmp_path / "in.avi")
    writer = cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*"MJPG"), 10, (80, 60))
    for k in range(4):
        writer.write(np.full((60, 80, 3), 60 * k, dtype=np.uint8))
    writer.release()
    target = predict_video(Predictor(cfg), path, tmp_path / "out", 0.5)
    capture = cv2.VideoCapture(str(target))
    assert capture.get(cv2.CAP_PROP_FRAME_COUNT) == 4
    assert capture.get(cv2.CAP_PROP_FPS) == 10
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["in.mp4"]


def test_bad_video(cfg, tmp_path):
    predictor = Predictor(cfg)
    with pytest.raises(FileNotFoundError, match="no such file"):
        predict_video(predictor, str(tmp_path / "a.mp4"), tmp_path / "out", 0.5)
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match="bad.mp4: no frame"):
        predict_video(predictor, str(tmp_path / "bad.mp4"), tmp_path / "out", 0.5)
    assert not list((tmp_path / "out").iterdir())


def test_a_frozen_config(cfg):
    cfg.freeze()
    assert Predictor(cfg).metadata.thing_classes == NAMES


def test_weights_that_are_not_there(cfg):
    cfg.MODEL.WEIGHTS = "nowhere.pth"
    with pytest.raises(FileNotFoundError, match="MODEL.WEIGHTS nowhere.pth could not be loaded"):
        Predictor(cfg)
    cfg.MODEL.WEIGHTS = ""
    with pytest.raises(ValueError, match="MODEL.WEIGHTS is empty"):
        Predictor(cfg)


@pytest.mark.parametrize("precision, tolerance", [("float32", 1e-4), ("bfloat16", 0.05)])
def test_optimized_predictor_detects_the_same(cfg, precision, tolerance, image):
    expected = Predictor(cfg)(image)["instances"]
    cfg.TEST.OPTIMIZE = precision
    predictor = Predictor(cfg)
    assert not any(p.requires_grad for p in predictor.model.parameters())
    assert predictor.model.backbone.fpn_output3.weight.dtype == getattr(torch, precision)
    found = predictor(image)["instances"]
    assert len(found) == len(expected) == 8
    assert (found.scores - expected.scores).abs().max() < tolerance


def test_channels_last_predictor_detects_the_same(cfg, image):
    expected = Predictor(cfg)(image)["instances"]
    cfg.MODEL.CHANNELS_LAST = True
    predictor = Predictor(cfg)
    weight = predictor.model.backbone.fpn_output3.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    found = predictor(image)["instances"]
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-4, atol=1e-5)


def test_evaluation_of_an_optimized_model(cfg, make_args, monkeypatch):
    """The same detections to the last digits; keys that can't be had are named."""
    cfg.MODEL.FCOS.NUM_CLASSES = 2
    model = build_model(cfg)
    head = model.proposal_generator.head
    torch.nn.init.normal_(head.cls_score.weight, std=0.1)
    torch.nn.init.constant_(head.cls_score.bias, 1.0)
    torch.nn.init.constant_(head.box_pred.bias, 2.0)  # 32 pixels at stride 8, as the objects have
    folder = Path(cfg.MODEL.WEIGHTS).parent
    FCOSCheckpointer(model, str(folder), class_names=["ball", "box"]).save("two")

    def run(*opts):
        weights = ("MODEL.WEIGHTS", str(folder / "two.pth"))
        return evaluate(setup(make_args(*weights, *opts, eval_only=True)))

    expected, found = run()["bbox"], run("TEST.OPTIMIZE", "float32")["bbox"]
    assert expected["AP50"] > 0
    assert found == pytest.approx(expected, abs=1e-3, nan_ok=True)
    with pytest.raises(ValueError, match="TEST.OPTIMIZE is 'fp16': set it to"):
        run("TEST.OPTIMIZE", "fp16")

    def no_compiler(function):
        raise OSError("No working C++ compiler found")

    monkeypatch.setattr(torch, "compile", no_compiler)
    with pytest.raises(RuntimeError, match=r"torch.compile .* does not work here"):
        run("TEST.OPTIMIZE", "float32+compile")
