"""With the same weights our FCOS gives what torchvision's and Detectron2's own FCOS give."""

import importlib.util

import pytest
import torch

from fcos_d2.checkpoint.convert import convert
from parity import (
    compare_checkpoint,
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
