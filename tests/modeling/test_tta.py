"""Views, their boxes on the original image, merging, and the two commands that use them."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import transforms as T
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch import GeneralizedRCNN, ProposalNetwork
from detectron2.structures import Boxes, Instances
from torch import nn

from fcos_d2.checkpoint import FCOSCheckpointer
from fcos_d2.data import DetectionDatasetMapper, class_names, load_records
from fcos_d2.engine import evaluate, prepare_datasets
from fcos_d2.engine.predict import Predictor
from fcos_d2.modeling import FCOS
from fcos_d2.modeling.tta import (
    FCOSWithTTA,
    map_to_original,
    merge_detections,
)


def set_views(cfg, min_sizes, max_size=4000, flip=False):
    cfg.TEST.AUG.ENABLED = True
    cfg.TEST.AUG.MIN_SIZES, cfg.TEST.AUG.MAX_SIZE, cfg.TEST.AUG.FLIP = min_sizes, max_size, flip
    return cfg


def views_cfg(min_sizes, **options):
    """For a stand-in: nothing else of a config is read."""
    cfg = get_cfg()
    cfg.INPUT.MIN_SIZE_TEST = 40
    return set_views(cfg, min_sizes, **options)


def make_instances(size, boxes, scores, classes):
    return Instances(
        size,
        pred_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)),
        scores=torch.tensor(scores, dtype=torch.float32),
        pred_classes=torch.tensor(classes, dtype=torch.int64),
    )


def assert_same(ours, expected):
    """Equal to the last bit."""
    assert ours.image_size == expected.image_size
    assert torch.equal(ours.pred_boxes.tensor, expected.pred_boxes.tensor)
    assert torch.equal(ours.scores, expected.scores)
    assert torch.equal(ours.pred_classes, expected.pred_classes)


class RectangleFinder(FCOS):
    """Finds the bright rectangle of an image where it starts left of ``reach`` pixels.

    The score is 0.5 + x0 / 100: a view and its mirror image differ in it.
    """

    def __init__(self, reach=10_000):
        nn.Module.__init__(self)
        self.reach = reach
        self.batches = []
        self.proposal_generator = nn.Module()
        self.proposal_generator.decoder = SimpleNamespace(nms_thresh=0.6, max_detections=100)
        self.eval()

    def forward(self, batched_inputs):
        self.batches.append([tuple(x["image"].shape[1:]) for x in batched_inputs])
        return [{"instances": self.find(x["image"])} for x in batched_inputs]

    def find(self, image):
        ys, xs = (image[0] > 128).nonzero(as_tuple=True)
        if not len(xs) or xs.min() >= self.reach:
            return make_instances(tuple(image.shape[1:]), [], [], [])
        box = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
        score = 0.5 + xs.min().item() / 100
        return make_instances(tuple(image.shape[1:]), [box], [score], [2])


def draw(height, width, box=None):
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    if box:
        x0, y0, x1, y1 = box
        image[:, y0:y1, x0:x1] = 255
    return image


def detecting_model(cfg):
    """Random weights that find something, at different scores."""
    model = build_model(cfg).eval()
    head = model.proposal_generator.head
    nn.init.normal_(head.cls_score.weight, std=0.1)
    nn.init.constant_(head.cls_score.bias, 0.0)
    nn.init.normal_(head.box_pred.weight, std=0.05)
    nn.init.constant_(head.box_pred.bias, 2.0)
    return model


@pytest.mark.parametrize("as_float", [False, True], ids=["bytes", "floats of bytes"])
def test_one_view_of_the_usual_size_is_the_plain_model(tiny_cfg, as_float):
    """To the last bit, at the size of the original image."""
    model = detecting_model(tiny_cfg)
    image = torch.randint(0, 256, (3, 121, 150), dtype=torch.uint8)
    resize = T.ResizeShortestEdge(96, 110).get_transform(image.permute(1, 2, 0).numpy())
    resized = resize.apply_image(image.permute(1, 2, 0).numpy()).transpose(2, 0, 1)
    inputs = {"image": torch.from_numpy(resized.copy()), "height": 121, "width": 150}
    with torch.no_grad():
        expected = model([inputs])[0]["instances"]
    given = image.float() if as_float else image
    found = FCOSWithTTA(set_views(tiny_cfg, (96,), 110), model)([{"image": given}])[0]["instances"]
    assert len(expected) == 100
    assert_same(found, expected)


def test_image_and_its_mirror_image_are_one_detection():
    """40 wide: a box from 5 to 20 is one from 20 to 35 in the mirror image.

    The scores are 0.5 + 5/100 and 0.5 + 20/100, of which the better stays.
    """
    model = RectangleFinder()
    wrapped = FCOSWithTTA(views_cfg((30,), flip=True), model)
    (output,) = wrapped([{"image": draw(30, 40, (5, 3, 20, 9))}])
    assert_same(output["instances"], make_instances((30, 40), [[5, 3, 20, 9]], [0.7], [2]))
    assert model.batches == [[(30, 40), (30, 40)]]


def test_views_of_several_sizes_and_an_input_that_was_resized():
    """The input is 30 x 40 of an image of 60 x 20: 2 down and 1/2 across.

    Its box 8, 4, 20, 10 is 4, 8, 10, 20 there. The views are 30 x 40 and, with the longer side
    limited to 80, 60 x 80, in which x0 is 16: the score is 0.5 + 16/100.
    """
    model = RectangleFinder()
    wrapped = FCOSWithTTA(views_cfg((30, 90), max_size=80), model)
    inputs = {"image": draw(30, 40, (8, 4, 20, 10)), "height": 60, "width": 20}
    (output,) = wrapped([inputs])
    assert_same(output["instances"], make_instances((60, 20), [[4, 8, 10, 20]], [0.66], [2]))
    assert model.batches == [[(30, 40)], [(60, 80)]]
    assert set(inputs) == {"image", "height", "width"} and inputs["image"].shape == (3, 30, 40)


def test_a_mapper_of_ones_own():
    """Upside down alone: in a height of 30, a box from 3 to 9 is one from 21 to 27."""

    def upside_down(inputs):
        return [{"image": inputs["image"].flip(1), "transforms": T.VFlipTransform(30)}]

    model = RectangleFinder()
    wrapped = FCOSWithTTA(get_cfg(), model, tta_mapper=upside_down)
    (output,) = wrapped([{"image": draw(30, 40, (5, 3, 20, 9))}])
    assert_same(output["instances"], make_instances((30, 40), [[5, 3, 20, 9]], [0.55], [2]))
    assert model.batches == [[(30, 40)]]


def test_boxes_are_mapped_back():
    """A view of 60 x 160 of an image of 30 x 40, 2 down and 4 across, then mirrored.

    x becomes (160 - x) / 4 and y becomes y / 2. Of 10, 20, 30, 60: (160 - 30) / 4 = 32.5, 10,
    (160 - 10) / 4 = 37.5, 30. Of -8, -4, 4, 10: 39, -2, 42, 5, clipped to 39, 0, 40, 5. The third
    box is out of the image: (160 - 180) / 4 = -5 to (160 - 170) / 4 = -2.5.
    """
    transforms = T.TransformList([T.ResizeTransform(30, 40, 60, 160), T.HFlipTransform(160)])
    boxes = [[10, 20, 30, 60], [-8, -4, 4, 10], [170, 4, 180, 8]]
    view = make_instances((60, 160), boxes, [0.9, 0.8, 0.7], [1, 0, 2])
    mapped = map_to_original(view, transforms, (30, 40))
    expected = [[32.5, 10, 37.5, 30], [39, 0, 40, 5]]
    assert_same(mapped, make_instances((30, 40), expected, [0.9, 0.8], [1, 0]))
    assert view.pred_boxes.tensor.tolist() == boxes  # they are the caller's


def iou(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in (a, b)]
    return width * height / (sum(areas) - width * height)


def merged_by_loops(views, thresh, limit):
    """Greedy NMS from its definition: the best one left suppresses those of its class."""
    rows = []
    for view in views:
        fields = (view.pred_boxes.tensor, view.scores, view.pred_classes)
        rows += list(zip(*(field.tolist() for field in fields), strict=True))
    kept = []
    for box, score, label in sorted(rows, key=lambda row: -row[1]):  # stable
        if all(label != other or iou(box, taken) <= thresh for taken, _, other in kept):
            kept.append((box, score, label))
    return kept[:limit]


@pytest.mark.parametrize("num_classes", [1, 4])
@pytest.mark.parametrize("corner, unit", [(0, 1.0), (60_000, 0.1)], ids=["near", "far and small"])
@pytest.mark.parametrize("limit", [7, 1000])
def test_merging_equals_plain_loops(num_classes, corner, unit, limit):
    """With equal scores in plenty; far from the origin float32 offsets would change IoU."""
    rng = np.random.default_rng(limit)
    views = []
    for count in (60, 0, 40):
        low = corner + unit * rng.uniform(0, 30, (count, 2))
        boxes = np.concatenate((low, low + unit * rng.uniform(5, 25, (count, 2))), axis=1)
        scores = rng.integers(1, 20, count) / 20
        classes = rng.integers(0, num_classes, count)
        views.append(make_instances((70_000, 70_000), boxes.tolist(), scores, classes))
    expected = merged_by_loops(views, 0.4, limit)
    assert min(7, limit) <= len(expected) < 90  # something is suppressed
    boxes, scores, classes = zip(*expected, strict=True)
    found = merge_detections(views, 0.4, limit)
    assert_same(found, make_instances((70_000, 70_000), boxes, scores, classes))


def test_ties_give_no_more_than_the_limit():
    """Of equal scores the earlier views' stay, in their order."""
    boxes = [[10 * k, 0, 10 * k + 5, 5] for k in range(6)]
    views = [make_instances((9, 99), boxes[k : k + 2], [0.5] * 2, [0] * 2) for k in (4, 0, 2)]
    found = merge_detections(views, 0.6, 3)
    expected = [boxes[4], boxes[5], boxes[0]]
    assert_same(found, make_instances((9, 99), expected, [0.5] * 3, [0] * 3))


def test_nothing_found():
    """In no view: every field, of length 0. In one of two: what the other finds."""
    wrapped = FCOSWithTTA(views_cfg((30, 60), flip=True), RectangleFinder())
    empty, found = wrapped([{"image": draw(30, 40)}, {"image": draw(30, 40, (5, 3, 20, 9))}])
    assert_same(empty["instances"], make_instances((30, 40), [], [], []))
    assert len(found["instances"]) == 1
    # The rectangle starts at 5 in the image, at 20 in its mirror image.
    wrapped = FCOSWithTTA(views_cfg((30,), flip=True), RectangleFinder(reach=10))
    (output,) = wrapped([{"image": draw(30, 40, (5, 3, 20, 9))}])
    assert_same(output["instances"], make_instances((30, 40), [[5, 3, 20, 9]], [0.55], [2]))
    assert wrapped([]) == []


@pytest.mark.parametrize(
    "meta_arch, advice",
    [(GeneralizedRCNN, "GeneralizedRCNNWithTTA"), (ProposalNetwork, "ProposalNetwork;")],
)
def test_other_models(meta_arch, advice):
    model = meta_arch.__new__(meta_arch)
    nn.Module.__init__(model)
    with pytest.raises(ValueError, match=f"TEST.AUG.ENABLED: .*{advice}"):
        FCOSWithTTA(views_cfg((30,)), model)


def test_views_that_can_not_be_had():
    for sizes in ((), (-1, 30)):
        with pytest.raises(ValueError, match="TEST.AUG.MIN_SIZES is .*set it to the shorter sides"):
            FCOSWithTTA(views_cfg(sizes), RectangleFinder())
    with pytest.raises(ValueError, match="TEST.AUG.MAX_SIZE is 0"):
        FCOSWithTTA(views_cfg((30,), max_size=0), RectangleFinder())


@pytest.mark.parametrize(
    "size, is_far", [(20, False), (80, False), (0, False), (19, True), (81, True)]
)
def test_warning_of_far_sizes(size, is_far, caplog):
    """The usual size is 40: less than half of it, or more than twice, is told."""
    FCOSWithTTA(views_cfg((40, size)), RectangleFinder())
    assert ("INPUT.MIN_SIZE_TEST 40" in caplog.text) == is_far


def test_training_mode():
    """The mode is the model's; in training it has no detections to give."""
    wrapped = FCOSWithTTA(views_cfg((30,)), RectangleFinder())
    assert not wrapped.training
    wrapped.train()
    with pytest.raises(ValueError, match="call eval"):
        wrapped([{"image": draw(30, 40)}])


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Four generated images, 160 to 224 pixels a side."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(tmp_path_factory.mktemp("datasets")))
        yield "shapes:tta:4"


@pytest.fixture
def shapes_cfg(tiny_cfg, source, tmp_path):
    """A config of the generated images, and weights that find something."""
    tiny_cfg.MODEL.FCOS.NUM_CLASSES = -1
    tiny_cfg.DATASETS.TRAIN, tiny_cfg.DATASETS.TEST = (), (source,)
    tiny_cfg.INPUT.MIN_SIZE_TEST, tiny_cfg.INPUT.MAX_SIZE_TEST = 96, 120
    tiny_cfg.INPUT.FORMAT = "RGB"
    tiny_cfg.OUTPUT_DIR = str(tmp_path)
    prepare_datasets(tiny_cfg, eval_only=True)
    model = detecting_model(tiny_cfg)
    FCOSCheckpointer(model, str(tmp_path), class_names=class_names(source)).save("model")
    tiny_cfg.MODEL.WEIGHTS = str(tmp_path / "model.pth")
    return tiny_cfg


def load(cfg):
    model = build_model(cfg).eval()
    FCOSCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    return model


def evaluated(cfg):
    """Results, and the predictions that were written."""
    results = evaluate(cfg)
    (path,) = Path(cfg.OUTPUT_DIR).glob("inference/*/coco_instances_results.json")
    return results, json.loads(path.read_text())


def test_evaluation(shapes_cfg, caplog):
    """One view of the usual size: the plain results. Two sizes, mirrored: those of the model."""
    plain_results, plain = evaluated(shapes_cfg)
    set_views(shapes_cfg, (96,), 120).freeze()
    results, found = evaluated(shapes_cfg)
    assert found == plain and len(found) == 400
    assert set(results["bbox"]) == set(plain_results["bbox"])
    assert shapes_cfg.INPUT.MIN_SIZE_TEST == 96  # the caller's config is as it was

    shapes_cfg.defrost()
    set_views(shapes_cfg, (80, 96), 120, flip=True)
    with caplog.at_level(logging.INFO, "fcos_d2"):
        _, found = evaluated(shapes_cfg)
    expected = "views per image: 4 (shorter side 80, 96, longer side up to 120, original and"
    assert expected in caplog.text and "WARNING" not in caplog.text
    assert found != plain
    expected = by_hand(shapes_cfg)
    assert [x["score"] for x in found] == expected["scores"]
    assert [x["category_id"] for x in found] == expected["classes"]


def by_hand(cfg):
    """Scores and classes of the wrapped model on the images as they are."""
    read = DetectionDatasetMapper(augmentations=[], image_format="RGB", is_train=False)
    outputs = FCOSWithTTA(cfg, load(cfg))([read(x) for x in load_records(cfg.DATASETS.TEST[0])])
    return {
        "scores": [x for output in outputs for x in output["instances"].scores.tolist()],
        "classes": [x for output in outputs for x in output["instances"].pred_classes.tolist()],
    }


def test_evaluation_of_an_optimized_model(shapes_cfg):
    set_views(shapes_cfg, (80, 96), 120, flip=True)
    _, expected = evaluated(shapes_cfg)
    shapes_cfg.TEST.OPTIMIZE = "float32"
    _, found = evaluated(shapes_cfg)
    scores = [[x["score"] for x in predictions] for predictions in (found, expected)]
    np.testing.assert_allclose(*scores, rtol=0, atol=1e-4)


def test_predictor(shapes_cfg):
    """As the evaluation: it gives the image as it is, and what `demo.py` sets has an effect."""
    image = np.random.default_rng(0).integers(0, 255, (121, 150, 3), dtype=np.uint8)
    expected = Predictor(shapes_cfg)(image)["instances"]
    assert len(expected) == 100
    assert_same(Predictor(set_views(shapes_cfg, (96,), 120))(image)["instances"], expected)
    predictor = Predictor(set_views(shapes_cfg, (80, 96), 120, flip=True))
    found = predictor(image)["instances"]
    rgb = torch.from_numpy(image[:, :, ::-1].copy()).permute(2, 0, 1)
    assert_same(found, FCOSWithTTA(shapes_cfg, load(shapes_cfg))([{"image": rgb}])[0]["instances"])
    assert found.scores.sum() > expected.scores.sum()
    predictor.model.proposal_generator.decoder.score_thresh = found.scores[8:10].mean().item()
    assert len(predictor(image)["instances"]) == 9
