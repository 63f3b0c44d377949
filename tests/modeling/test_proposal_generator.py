"""Host-device syncs of the losses, and cached grids."""

import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from benchmark.measure import Job, count_operators
from fcos_d2.modeling import compute_locations
from fcos_d2.modeling.proposal_generator import (
    Predictions,
    _known_locations,
)

SIZES, STRIDES = [(16, 20), (8, 10), (4, 5), (2, 3), (1, 2)], [8, 16, 32, 64, 128]
BOXES = [[[8, 8, 60, 70], [30, 10, 110, 90], [5, 90, 20, 100]], [[0, 0, 160, 128]]]


def test_host_device_syncs(tiny_cfg):
    """One for the number of positives, one for the logged metrics."""
    locations = compute_locations(SIZES, STRIDES)
    outputs = [torch.rand(2, len(locations.points), *n, requires_grad=True) for n in ([3], [4], [])]
    gt = [
        Instances(
            (128, 160),
            gt_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32)),
            gt_classes=torch.arange(len(boxes)),
        )
        for boxes in BOXES
    ]
    generator = build_model(tiny_cfg).proposal_generator

    def run():
        with EventStorage():
            losses = generator.losses(Predictions(locations, *outputs), gt)
        sum(losses.values()).backward()

    assert count_operators(Job("losses", run))[0] == 2


def test_grids_are_kept_and_stay_usable(tiny_cfg):
    """One made under inference mode serves training, where such tensors are refused."""
    model = build_model(tiny_cfg)
    inputs = {"image": torch.zeros(3, 96, 160, dtype=torch.uint8)}
    with torch.inference_mode():
        model.eval()([inputs])
    known = _known_locations.cache_info()
    instances = Instances((96, 160), gt_boxes=Boxes(torch.tensor([[8.0, 8, 60, 70]])))
    instances.gt_classes = torch.zeros(1, dtype=torch.long)
    with EventStorage():
        sum(model.train()([{**inputs, "instances": instances}]).values()).backward()
    assert _known_locations.cache_info().hits == known.hits + 1


def test_traced_grids_are_not_kept(tiny_cfg):
    model = build_model(tiny_cfg).eval()
    known = _known_locations.cache_info()
    with FakeTensorMode(allow_non_fake_inputs=True):
        locations = model.proposal_generator._locations(((8, 8),) * 5, None, torch.zeros(1))
        assert type(locations.points) is FakeTensor
    assert _known_locations.cache_info() == known
