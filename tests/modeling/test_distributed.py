"""Gradients of two ranks with an image each are those of one with both. A script: one rank."""

from pathlib import Path

import pytest
import torch
from detectron2.engine import default_argument_parser
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from fcos_d2.engine import launch
from fcos_d2.engine.trainer import distribute

# Boxes of two images of 96 x 96 pixels. At stride 8 locations are at 4, 12, 20, ...: a box from 5
# to 11 holds none, and so gives no positive.
BIG, WIDE, SMALL = (10, 12, 60, 58), (20, 30, 92, 62), (30, 60, 50, 76)
NOTHING = (5, 5, 11, 11)
CASES = {
    "unequal positives": ([BIG, WIDE, SMALL], [SMALL]),
    "no positive on rank 1": ([BIG, WIDE], [NOTHING]),
    "no positive on rank 0": ([NOTHING], [BIG]),
    "no positive at all": ([NOTHING], [NOTHING]),
    "an image without boxes": ([BIG], []),
    "ignored boxes": ([BIG, WIDE], [SMALL, BIG]),
}
# The cases in which a rank has no positive.
NO_POSITIVE = (
    {"no positive on rank 0", "no positive at all"},
    {"no positive on rank 1", "no positive at all", "an image without boxes"},
)
WEIGHTS = ("none", "centerness")


def make_input(boxes, ignore_last):
    instances = Instances((96, 96))
    instances.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.gt_classes = torch.arange(len(boxes)) % 3
    instances.gt_ignore = (torch.arange(len(boxes)) == len(boxes) - 1) & ignore_last
    return {"image": torch.randint(0, 255, (3, 96, 96)), "instances": instances}


def backward(model, inputs):
    """Losses, gradients by name and number of positives of this rank."""
    model.zero_grad()
    with EventStorage() as storage:
        losses = model(inputs)
    sum(losses.values()).backward()
    named = getattr(model, "module", model).named_parameters()
    # The stages of the ResNet are most of the model; if the stem before them is right, so are they.
    gradients = {k: p.grad.clone() for k, p in named if ".bottom_up.res" not in k}
    num_pos, _ = storage.latest()["fcos/num_pos"]
    return {k: x.item() for k, x in losses.items()}, gradients, num_pos


@pytest.fixture
def models(tiny_cfg):
    """One of each weighting, in double precision, with the same weights."""
    made = {}
    for weight in WEIGHTS:
        tiny_cfg.MODEL.FCOS.BOX_LOSS_WEIGHT = weight
        torch.manual_seed(0)
        made[weight] = build_model(tiny_cfg).double().train()
    return made


@pytest.mark.slow
def test_two_ranks_have_the_gradients_of_one(models, tmp_path, torchrun):
    inputs = {
        case: [make_input(boxes, case == "ignored boxes") for boxes in images]
        for case, images in CASES.items()
    }
    torch.save((models, inputs), tmp_path / "work.pth")
    torchrun(__file__, tmp_path)
    ranks = [torch.load(tmp_path / f"rank{rank}.pth", weights_only=False) for rank in range(2)]
    for (weight, case), (losses, gradients, num_pos) in ranks[0].items():
        other_losses, other_gradients, other_num_pos = ranks[1][weight, case]
        wanted_losses, wanted, wanted_num_pos = backward(models[weight], inputs[case])
        assert num_pos + other_num_pos == wanted_num_pos, case
        assert (num_pos == 0) == (case in NO_POSITIVE[0]), case
        assert (other_num_pos == 0) == (case in NO_POSITIVE[1]), case
        for name, value in wanted_losses.items():
            mean = (losses[name] + other_losses[name]) / 2
            assert mean == pytest.approx(value, rel=1e-6, abs=1e-12), (weight, case, name)
        assert gradients.keys() == other_gradients.keys() == wanted.keys()
        assert "backbone.bottom_up.stem.conv1.weight" in wanted
        assert any(x.abs().max() > 1e-3 for x in wanted.values())
        for name, value in wanted.items():
            assert torch.equal(gradients[name], other_gradients[name]), (weight, case, name)
            torch.testing.assert_close(gradients[name], value, rtol=1e-6, atol=1e-9, msg=name)
    assert len(ranks[0]) == len(CASES) * len(WEIGHTS)


def run_rank(args):
    """Save what this rank finds for its image of each case."""
    (folder,) = args.opts
    models, inputs = torch.load(Path(folder) / "work.pth", weights_only=False)
    rank = comm.get_rank()
    found = {}
    for weight, model in models.items():
        model = distribute(model)
        for case, images in inputs.items():
            found[weight, case] = backward(model, images[rank : rank + 1])
    torch.save(found, Path(folder) / f"rank{rank}.pth")


if __name__ == "__main__":
    arguments = default_argument_parser().parse_args()
    launch(run_rank, arguments, output_dir=arguments.opts[0])
