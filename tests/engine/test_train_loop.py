"""The training step: precision and checks. Run as a script, it is one rank of a test."""

import hashlib
import itertools
import math
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from detectron2.engine import SimpleTrainer, default_argument_parser
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from fcos_d2.engine import Trainer, TrainLoop, launch, setup
from fcos_d2.engine.train_loop import autocast_dtype

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


def make_input(generator, size=96):
    """A dark image with three bright squares of three classes."""
    image = torch.randint(0, 60, (3, size, size), generator=generator, dtype=torch.uint8)
    boxes = []
    for k in range(3):
        x, y, side = (torch.rand(3, generator=generator) * size / 2).int().tolist()
        side += 12
        image[k, y : y + side, x : x + side] = 250
        boxes.append([x, y, min(x + side, size), min(y + side, size)])
    instances = Instances((size, size), gt_boxes=Boxes(torch.tensor(boxes).float()))
    instances.gt_classes = torch.arange(3)
    return {"image": image, "instances": instances}


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(0)
    return [[make_input(generator), make_input(generator)] for _ in range(5)]


@pytest.fixture
def make_loop(tiny_cfg, batches):
    """Build a model, always the same, and its training: ``make_loop(kind, **options)``."""

    def make(kind=TrainLoop, **options):
        torch.manual_seed(0)
        model = build_model(tiny_cfg)
        return kind(model, itertools.cycle(batches), build_optimizer(tiny_cfg, model), **options)

    return make


def step(loop, iteration=0):
    """Take a step and return the losses that it wrote."""
    with EventStorage(iteration) as storage:
        loop.iter = iteration
        loop.run_step()
        return {k: v for k, (v, _) in storage.latest().items() if k.startswith("loss")}


# Precision


@pytest.mark.parametrize(
    "precision, device, expected",
    [
        ("auto", "cpu", torch.bfloat16),
        ("auto", "cuda", torch.float16),
        ("float16", "cuda", torch.float16),
        ("bfloat16", "cuda", torch.bfloat16),
        ("bfloat16", "cpu", torch.bfloat16),
    ],
)
def test_precisions(precision, device, expected):
    assert autocast_dtype(precision, device) is expected


def test_invalid_precisions():
    with pytest.raises(ValueError, match="PRECISION is 'half', not one of.*'bfloat16'"):
        autocast_dtype("half", "cpu")
    with pytest.raises(ValueError, match="needs CUDA, .* on the cpu: set it to 'bfloat16'"):
        autocast_dtype("float16", "cpu")


def test_float16_on_the_cpu_is_refused(make_args):
    options = ("SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.PRECISION", "float16")
    with pytest.raises(ValueError, match="SOLVER.AMP.PRECISION is 'float16', which needs CUDA"):
        Trainer(setup(make_args(*options)))


def test_a_step_in_single_precision_is_detectron2s(make_loop, assert_equal):
    ours, theirs = make_loop(), make_loop(SimpleTrainer)
    for iteration in range(3):
        assert step(ours, iteration) == step(theirs, iteration)
    assert_equal(ours.model.state_dict(), theirs.model.state_dict())


@pytest.mark.slow
def test_50_iterations_in_bfloat16_stay_with_float32(make_loop, batches):
    """Each loss is within 2 % of float32's, for the same weights and the same batch.

    Compared at all weights that training in bfloat16 visits: two separate runs would diverge by
    rounding, as they do with another order of the images.
    """
    loop = make_loop(precision="bfloat16")
    first, *_, last = [compare_step(loop, batches, iteration) for iteration in range(50)]
    assert last["loss_cls"] < first["loss_cls"] / 2  # it does learn meanwhile


def compare_step(loop, batches, iteration):
    """Take a step, compare its losses with those in float32, and return them."""
    with torch.no_grad(), EventStorage():
        full = loop.model(batches[iteration % len(batches)])
    half = step(loop, iteration)
    assert half.keys() == full.keys() and len(half) == 3
    for name, value in full.items():
        assert half[name] == pytest.approx(value.item(), rel=0.02), (iteration, name)
    assert any(half[name] != value.item() for name, value in full.items())
    return half


@needs_cuda
@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_50_iterations_in_half_precision_on_cuda(tiny_cfg, make_loop, batches, precision):
    tiny_cfg.MODEL.DEVICE = "cuda"
    loop = make_loop(precision=precision)
    assert loop.grad_scaler.is_enabled() == (precision == "float16")
    first, *_, last = [compare_step(loop, batches, iteration) for iteration in range(50)]
    assert last["loss_cls"] < first["loss_cls"] / 2


def test_boxes_are_not_decoded_in_half_precision(tiny_cfg):
    """Boxes are exact far to the right, where bfloat16 resolves only every eighth pixel."""
    model = build_model(tiny_cfg).eval()
    generator = model.proposal_generator
    torch.nn.init.constant_(generator.head.cls_score.bias, 1.0)
    torch.nn.init.normal_(generator.head.box_pred.weight, std=0.1)
    torch.nn.init.constant_(generator.head.box_pred.bias, 1.3)
    seen = {}
    generator.head.register_forward_hook(lambda _m, _i, output: seen.update(ltrb=output[1][0]))
    image = torch.randint(0, 255, (3, 64, 2048), dtype=torch.uint8)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        boxes = model([{"image": image}])[0]["instances"].pred_boxes.tensor
    assert seen["ltrb"].dtype == torch.bfloat16 and len(boxes) == 100
    assert boxes.dtype == torch.float32 and boxes.max() > 1500

    # All possible boxes in double precision, from the finest level on, row by row.
    expected = []
    for stride, columns in ((8, 256), (16, 128), (32, 64), (64, 32), (128, 16)):
        rows = max(1, 64 // stride)
        y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        center = (torch.stack((x, y), dim=2).reshape(-1, 2).double() + 0.5) * stride
        start = sum(len(e) for e in expected)
        ltrb = seen["ltrb"][start : start + len(center)].double() * stride
        expected.append(torch.cat((center - ltrb[:, :2], center + ltrb[:, 2:]), dim=1))
    expected = torch.cat(expected)
    assert len(expected) == len(seen["ltrb"])
    limit = torch.tensor([2048.0, 64, 2048, 64], dtype=torch.float64)
    expected = expected.clamp(min=0).minimum(limit)
    assert torch.cdist(boxes.double(), expected, p=math.inf).min(1).values.max() < 1e-3


def test_a_resumed_run_has_the_scale_of_the_gradients(make_loop):
    """The scaler of float16, which this test puts on the CPU."""
    loop, resumed, old = make_loop(), make_loop(), make_loop()
    for x in (loop, resumed, old):
        x.grad_scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)
    for iteration in range(3):
        step(loop, iteration)
    assert loop.grad_scaler.get_scale() == 128
    resumed.load_state_dict(loop.state_dict())
    assert resumed.grad_scaler.state_dict() == loop.grad_scaler.state_dict()
    assert resumed.iter == 2 and resumed.optimizer.state_dict()["state"]

    # Checkpoints of single precision, and those of SimpleTrainer, have none.
    old.load_state_dict(make_loop().state_dict())
    old.load_state_dict(make_loop(SimpleTrainer).state_dict())
    assert old.grad_scaler.get_scale() == 64


def test_a_scaled_step_that_overflows_is_skipped(make_loop, assert_equal):
    loop = make_loop()
    loop.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)
    before = clone(loop.model.state_dict())
    parameter = next(p for p in loop.model.parameters() if p.requires_grad)
    parameter.register_hook(lambda grad: grad * math.inf)
    step(loop)
    assert_equal(loop.model.state_dict(), before)
    assert loop.grad_scaler.get_scale() == 2.0**99


# Losses and gradients that are not finite


def test_weights_that_are_not_finite(make_loop):
    loop = make_loop()
    with torch.no_grad():
        loop.model.proposal_generator.head.cls_score.bias[1] = math.inf
    with pytest.raises(FloatingPointError, match="iteration 7") as caught:
        step(loop, 7)
    text = str(caught.value)
    assert "loss_cls is " in text and "loss_box" not in text and "loss_ctr" not in text
    # One class of three, at 12² + 6² + 3² + 2² + 1 = 194 locations of two images.
    assert "; 388 of 1164 are not finite." in text
    assert "an image without a file, an image without a file" in text


def test_the_largest_logit_is_named(make_loop, batches):
    """Logits of 3e38 are finite in float32, but their sum over the locations is not."""
    loop = make_loop()
    head = loop.model.proposal_generator.head
    with torch.no_grad():
        head.cls_score.weight.zero_()
        head.cls_score.bias.copy_(torch.tensor([-1.0, 3e38, -2.0]))
    with pytest.raises(FloatingPointError, match=r"class logit of the head: 3e\+38\.\n"):
        step(loop)
    assert not head._forward_hooks  # nothing stays behind in the model


def test_a_gradient_that_is_not_finite(make_loop, assert_equal):
    """Clipping would make it NaN: the step is not taken."""
    loop = make_loop()
    bias = loop.model.proposal_generator.head.box_pred.bias
    bias.register_hook(lambda grad: grad * math.inf)
    before = clone(loop.model.state_dict())
    with pytest.raises(FloatingPointError, match=r"of 1 parameters are not \(.*box_pred\.bias\)"):
        step(loop)
    assert_equal(loop.model.state_dict(), before)


@pytest.mark.slow
@pytest.mark.parametrize("iteration", [4, 5], ids=["in_between", "in_the_last_iteration"])
def test_a_stop_leaves_weights_and_checkpoints_alone(make_args, tmp_path, iteration, assert_equal):
    """A run of 3 iterations goes on to 6, and meets an image of NaN on its way."""
    options = ("SOLVER.CHECKPOINT_PERIOD", "2", "DATALOADER.ASPECT_RATIO_GROUPING", "False")
    train(setup(make_args("SOLVER.MAX_ITER", "3", *options)))
    trainer = Trainer(setup(make_args("SOLVER.MAX_ITER", "6", *options, resume=True)))
    trainer.resume_or_load(resume=True)
    snapshots = corrupt_images(trainer, iteration)
    evaluations = count_evaluations(trainer)
    with pytest.raises(FloatingPointError) as caught:
        trainer.train()

    before, files = snapshots
    assert_equal(trainer.model.state_dict(), before)
    assert read_checkpoints(tmp_path / "out") == files and "last_checkpoint" in files
    assert not evaluations
    text = str(caught.value)
    assert f"iteration {iteration}, before its optimizer step: loss_cls is nan" in text
    assert "Largest absolute class logit of the head: not finite" in text
    for name in trainer.bad_files:
        assert name in text
    assert len(trainer.bad_files) == 2 and "SOLVER.BASE_LR" in text and "--resume" in text
    # The hooks have closed their files, and the reason is in the log.
    assert f"iteration {iteration}, before" in (tmp_path / "out" / "log.txt").read_text()

    resumed = Trainer(setup(make_args("SOLVER.MAX_ITER", "6", *options, resume=True)))
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 4


def train(cfg):
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()


def corrupt_images(trainer, iteration):
    """Make NaN of the images of one iteration, and list weights and checkpoints just before."""
    snapshots = []
    trainer.bad_files = []
    mapper = trainer.data_loader.dataset.mapper

    def corrupted(record):
        inputs = mapper(record)
        if trainer.iter == iteration:
            inputs["image"] = inputs["image"].float() * math.nan
            trainer.bad_files.append(inputs["file_name"])
            snapshots[:] = (
                clone(trainer.model.state_dict()),
                read_checkpoints(Path(trainer.cfg.OUTPUT_DIR)),
            )
        return inputs

    trainer.data_loader.dataset.mapper = corrupted
    return snapshots


def count_evaluations(trainer):
    calls = []
    trainer.test = lambda *_: calls.append(1) or {}
    return calls


def read_checkpoints(folder):
    paths = [*folder.glob("*.pth"), *folder.glob("last_checkpoint")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def clone(tensors):
    return {key: value.clone() for key, value in tensors.items()}


# Two ranks


@pytest.mark.slow
def test_all_ranks_stop_and_one_that_dies_takes_the_others_with_it(make_args, tmp_path, torchrun):
    """Rank 1 meets an image of NaN: both stop. Then it fails while rank 0 waits for it."""
    args = make_args("SOLVER.MAX_ITER", "4")
    text = torchrun(__file__, "--config-file", args.config_file, *args.opts, ok=False)
    assert "rank 1 has had enough" in text and "rank 0 went on" not in text
    good, bad = ((tmp_path / "out" / f"stop{rank}.txt").read_text() for rank in range(2))
    for message in (good, bad):
        assert "Training stopped at iteration 2, before its optimizer step" in message
    assert "a loss of rank 1 is not finite" in good and "on rank 0: " in good
    assert "loss_cls is nan, loss_box is nan" in bad and "on rank 1: " in bad
    assert "class logit" in bad and "class logit" not in good
    assert not list((tmp_path / "out").glob("*.pth"))


def run_rank(args):
    """What each rank of the test above does."""
    trainer = Trainer(setup(args))
    trainer.resume_or_load(resume=False)
    if comm.get_rank() == 1:
        corrupt_images(trainer, iteration=2)
    try:
        trainer.train()
    except FloatingPointError as error:
        path = os.path.join(trainer.cfg.OUTPUT_DIR, f"stop{comm.get_rank()}.txt")
        Path(path).write_text(str(error))
    if comm.get_rank() == 1:
        raise RuntimeError("rank 1 has had enough")
    dist.barrier()
    print("rank 0 went on")


if __name__ == "__main__":
    launch(run_rank, default_argument_parser().parse_args())
