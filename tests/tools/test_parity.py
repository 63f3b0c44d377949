"""With the same weights our FCOS gives what torchvision's and Detectron2's own FCOS give."""

import importlib.util

import pytest
import torch
from detectron2.structures import Boxes, Instances

from fcos_d2.checkpoint.convert import convert
from parity import (
    Parity,
    compare_checkpoint,
    compare_detections,
    random_samples,
    random_training_batches,
    relative_difference,
)
from peers import random_checkpoint

LIVE = [
    "torchvision",
    pytest.param(
        "detectron2",
        marks=pytest.mark.skipif(
            importlib.util.find_spec("detectron2.modeling.meta_arch.fcos") is None,
            reason="this version of Detectron2 has no FCOS of its own to compare with",
        ),
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("source", LIVE)
def test_detections_losses_and_gradients(source):
    """6 sizes in batches of 1 and 3, and 50 training batches; see parity.py for what is in them."""
    parity = compare_checkpoint(random_checkpoint(source, num_classes=7))
    print(source, parity)
    assert parity.images == 6 * (1 + 3)
    assert parity.detections > 24 * 50
    assert parity.outputs < 1e-4
    assert parity.unequal_images == 0
    assert parity.boxes < 0.01
    assert parity.scores < 1e-5
    assert parity.training_images >= 90
    assert parity.losses < 1e-4
    assert parity.gradients < 1e-3


@pytest.mark.parametrize(
    "key, value",
    [
        ("MODEL.FCOS.LOCATION_OFFSET", 0.5),
        ("MODEL.FCOS.LOCATION_STEP", "stride"),
        ("MODEL.FCOS.SCORE", "product"),
        ("MODEL.RESNETS.STRIDE_IN_1X1", True),
        ("INPUT.FORMAT", "BGR"),
    ],
)
def test_a_wrong_option_is_seen(monkeypatch, key, value):
    """What the comparison is for: each key that travels with the weights is needed."""

    def convert_wrongly(checkpoint, source):
        return convert(checkpoint, source, overrides={key: value})

    monkeypatch.setattr("parity.convert", convert_wrongly)
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, 96, 160), dtype=torch.uint8, generator=generator)
    checkpoint = random_checkpoint("torchvision", 3)
    parity = compare_checkpoint(checkpoint, "torchvision", [[{"image": image}]], [])
    assert parity.unequal_images == 1 or parity.boxes > 1


class Fixed:
    """A model that gives the same detections of one image, whatever the image."""

    def __init__(self, xs, scores, classes=(0, 0)):
        boxes = Boxes(torch.tensor([[x, 0.0, x + 5, 5.0] for x in xs]))
        self.found = Instances((64, 64), pred_boxes=boxes, scores=torch.tensor(scores))
        self.found.pred_classes = torch.tensor(classes)

    def detect_with_outputs(self, samples):
        return [self.found], []


@pytest.mark.parametrize(
    "xs, scores, their_scores, their_classes, difference",
    [
        ((30.0, 0.0), (0.5, 0.5), (0.5, 0.4999999), (0, 0), 0),  # tied: any order
        ((30.0, 0.0), (0.5, 0.5), (0.5, 0.49999), (0, 0), 30),  # not tied
        ((30.0, 0.0), (0.5, 0.5), (0.5, 0.5), (0, 1), 30),  # tied, of two classes
        ((0.0, 0.0), (0.5, 0.5), (0.5, 0.5), (0, 0), 30),  # tied, the second box is missing
        ((0.0, 30.0), (0.9, 0.8), (0.5, 0.4), (0, 0), 0),  # other scores, the same boxes
    ],
)
def test_order_of_tied_detections(xs, scores, their_scores, their_classes, difference):
    """Their boxes begin at x = 0 and 30, ours as listed, so the boxes differ by 0 or 30."""
    parity, theirs = Parity(), Fixed((0.0, 30.0), their_scores, their_classes)
    compare_detections(parity, Fixed(xs, scores, their_classes), theirs, [[{}]])
    assert (parity.unequal_images, parity.boxes) == (0, difference)
    wanted = max(abs(a - b) for a, b in zip(scores, their_scores, strict=True))
    assert parity.scores == pytest.approx(wanted, abs=1e-7)  # float32


def test_training_batches_have_what_matters():
    batches = random_training_batches(7)
    counts = [[len(sample["instances"]) for sample in batch] for batch in batches]
    assert len(counts) == 50
    assert any(sum(batch) == 0 for batch in counts)
    assert any(0 in batch and sum(batch) > 0 for batch in counts)
    assert max(map(max, counts)) > 40
    (sample,) = random_samples(1, (500, 640), 7, seed=48)
    areas = sample["instances"].gt_boxes.area().sort().values
    assert (areas.diff() > 15).all()


def test_relative_difference_by_hand():
    """|1.1 - 1| / max(1, mean 2) = 0.05 and |3.3 - 3| / 3 = 0.1."""
    difference = relative_difference(torch.tensor([1.1, 3.3]), torch.tensor([1.0, 3.0]))
    assert difference == pytest.approx(0.1)
    assert relative_difference(torch.zeros(0), torch.zeros(0)) == 0
    with pytest.raises(ValueError, match="shapes differ"):
        relative_difference(torch.zeros(2), torch.zeros(3))
