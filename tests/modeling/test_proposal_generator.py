"""Losses of static shapes, waits for the device and the grids that are kept."""

import pytest
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
    _nonzero_static,
)

SIZES, STRIDES = [(16, 20), (8, 10), (4, 5), (2, 3), (1, 2)], [8, 16, 32, 64, 128]
BOXES = {
    "two images": ([[8, 8, 60, 70], [30, 10, 110, 90], [5, 90, 20, 100]], [[0, 0, 160, 128]]),
    "an ignored box": ([[8, 8, 60, 70], [30, 10, 110, 90]], []),
    "no box": ([], []),
}


def make_case(name):
    """Predictions as leaves, and the ground truth of two images."""
    generator = torch.Generator().manual_seed(0)
    locations = compute_locations(SIZES, STRIDES)
    count = len(locations.points)
    tensors = [
        torch.randn(2, count, 3, generator=generator),
        0.1 + 3 * torch.rand(2, count, 4, generator=generator),
        torch.randn(2, count, generator=generator),
    ]
    gt = []
    for boxes in BOXES[name]:
        instances = Instances((128, 160), gt_boxes=Boxes(torch.tensor(boxes).reshape(-1, 4)))
        instances.gt_classes = torch.arange(len(boxes)) % 3
        instances.gt_ignore = torch.tensor([name == "an ignored box"] + [False] * 9)[: len(boxes)]
        gt.append(instances)
    return Predictions(locations, *(x.requires_grad_() for x in tensors)), gt


def losses_and_gradients(generator, case):
    predictions, gt = case
    with EventStorage():
        losses = generator.losses(predictions, gt)
    gradients = torch.autograd.grad(sum(losses.values()), predictions[1:])
    return losses, gradients


@pytest.mark.parametrize("name", BOXES)
@pytest.mark.parametrize("quality", ["centerness", "iou"])
@pytest.mark.parametrize("weight", ["none", "centerness"])
@pytest.mark.parametrize("radius", [1.5, 0.0])
def test_static_shapes_change_no_loss_and_no_gradient(tiny_cfg, name, quality, weight, radius):
    tiny_cfg.MODEL.FCOS.QUALITY = quality
    tiny_cfg.MODEL.FCOS.BOX_LOSS_WEIGHT = weight
    tiny_cfg.MODEL.FCOS.CENTER_SAMPLING_RADIUS = radius
    plain = build_model(tiny_cfg).proposal_generator
    tiny_cfg.MODEL.FCOS.STATIC_SHAPES = True
    static = build_model(tiny_cfg).proposal_generator
    expected, expected_gradients = losses_and_gradients(plain, make_case(name))
    got, gradients = losses_and_gradients(static, make_case(name))
    assert list(got) == list(expected)
    for key in got:
        torch.testing.assert_close(got[key], expected[key])
    for mine, other in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(mine, other)


def count(generator, name):
    case = make_case(name)
    return count_operators(Job("losses", lambda: losses_and_gradients(generator, case)))


def test_waits_for_the_device(tiny_cfg):
    """The positives' number and the values to log; with static shapes none at all."""
    assert count(build_model(tiny_cfg).proposal_generator, "two images")[0] == 2
    tiny_cfg.MODEL.FCOS.STATIC_SHAPES = True
    generator = build_model(tiny_cfg).proposal_generator
    syncs, kernels = count(generator, "two images")
    assert syncs == 0
    # A graph replays the same kernels whatever the boxes are, as long as they are as many.
    case = make_case("two images")
    for instances in case[1]:
        instances.gt_boxes.tensor[:] = 0  # an empty box claims nothing: boxes to fill up with
    again = count_operators(Job("losses", lambda: losses_and_gradients(generator, case)))
    assert again == (0, kernels)


def test_a_whole_step_without_a_wait(tiny_cfg):
    """Images, matching, losses and gradients, all on the device of the model.

    Detectron2's ``ImageList`` reads sizes from tensors that are on the CPU always.
    """
    tiny_cfg.MODEL.FCOS.STATIC_SHAPES = True
    model = build_model(tiny_cfg)
    instances = make_case("two images")[1]
    batch = [
        {"image": torch.randint(0, 256, (3, 128, 160), dtype=torch.uint8), "instances": x}
        for x in instances
    ]

    def step():
        with EventStorage():
            sum(model(batch).values()).backward()

    of_sizes, _ = count_operators(Job("images", lambda: model.preprocess_image(batch)))
    assert count_operators(Job("step", step))[0] == of_sizes


def test_static_nonzero():
    mask = torch.tensor([[False, True, False], [True, False, True]])
    (rows, columns), valid = _nonzero_static(mask, 5)
    assert list(zip(rows[valid].tolist(), columns[valid].tolist(), strict=True)) == [
        (0, 1),
        (1, 0),
        (1, 2),
    ]
    assert valid.tolist() == [True] * 3 + [False] * 2


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
