"""The shipped lazy config is the yaml recipe, and the command trains, resumes and evaluates it."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import default_argument_parser
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler, build_optimizer
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

import lazyconfig_train_net as tool
from fcos_d2.data import build_train_loader
from fcos_d2.engine import load_cfg

ROOT = Path(__file__).resolve().parents[2]
FILE = str(ROOT / "configs" / "lazy" / "fcos_r50_voc.py")
YAML = str(ROOT / "configs" / "FCOS_R50_VOC.yaml")

# A config as users write it: another one, edited.
SMALL = f"""
from detectron2.config import LazyConfig

model, dataloader, optimizer, lr_multiplier, train = LazyConfig.load(
    {FILE!r}, ("model", "dataloader", "optimizer", "lr_multiplier", "train")
)
model.backbone.bottom_up.stages.depth = 18
del model.backbone.bottom_up.stages.stride_in_1x1
model.backbone.bottom_up.freeze_at = 0
model.backbone.out_channels = 64
model.proposal_generator.head.update(num_classes=6, num_cls_convs=1, num_box_convs=1)
dataloader.train.dataset.names = dataloader.test.dataset.names = "shapes:lazy:2"
dataloader.train.update(total_batch_size=2, num_workers=0)
dataloader.train.mapper.augmentations[0].short_edge_length = [64]
dataloader.test.mapper.augmentations[0].short_edge_length = 64
dataloader.test.num_workers = 0
train.update(init_checkpoint="", max_iter=4, eval_period=0, log_period=1)
train.checkpointer.period = 2
train.ema.enabled = True
"""


@pytest.fixture
def small(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    path = tmp_path / "small.py"
    path.write_text(SMALL)
    return str(path)


def run(config_file, *arguments):
    args = ["--config-file", config_file, *arguments, "train.device=cpu"]
    return tool.main(default_argument_parser().parse_args(args))


def load(path):
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def models():
    """The models of the lazy config and of the yaml recipe, from the same seed."""
    torch.manual_seed(0)
    lazy = instantiate(LazyConfig.load(FILE).model)
    torch.manual_seed(0)
    return lazy, build_model(load_cfg(YAML, ["MODEL.DEVICE", "cpu"]))


def test_the_model_is_that_of_the_recipe(models):
    lazy, recipe = models
    assert repr(lazy) == repr(recipe)  # every layer with its options
    state, expected = lazy.state_dict(), recipe.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    frozen, expected_frozen = (
        [name for name, p in model.named_parameters() if not p.requires_grad] for model in models
    )
    assert frozen == expected_frozen and any("res2" in name for name in frozen)
    for part in ("decoder", "matcher"):
        assert vars(getattr(lazy.proposal_generator, part)) == vars(
            getattr(recipe.proposal_generator, part)
        )
    assert (lazy.input_format, lazy.vis_period) == (recipe.input_format, recipe.vis_period)


def test_losses_and_detections_are_those_of_the_recipe(models):
    instances = Instances((96, 120), gt_boxes=Boxes(torch.tensor([[8.0, 8.0, 60.0, 70.0]])))
    instances.gt_classes = torch.tensor([5])
    batch = [{"image": torch.randint(0, 256, (3, 96, 120)), "instances": instances}]
    with torch.no_grad(), EventStorage():
        losses, expected = (model.train()(batch) for model in models)
        for model in models:
            model.proposal_generator.decoder.score_thresh = 0.0
        (found,), (expected_found,) = (model.eval()(batch) for model in models)
    assert losses == expected and len(losses) == 3
    found, expected_found = found["instances"], expected_found["instances"]
    assert len(found) > 10
    assert torch.equal(found.pred_boxes.tensor, expected_found.pred_boxes.tensor)
    assert torch.equal(found.scores, expected_found.scores)


def test_optimizer_and_schedule_are_those_of_the_recipe(models):
    lazy, recipe = LazyConfig.load(FILE), load_cfg(YAML, [])
    recipe.SOLVER.WEIGHT_DECAY_BIAS = None  # the default but in Detectron2 v0.5
    lazy.optimizer.params.model, model = models
    optimizer, expected = instantiate(lazy.optimizer), build_optimizer(recipe, model)
    for group, other in zip(optimizer.param_groups, expected.param_groups, strict=True):
        for key in ("lr", "momentum", "nesterov", "weight_decay"):
            assert group[key] == other[key]
        assert [p.shape for p in group["params"]] == [p.shape for p in other["params"]]
    clip = recipe.SOLVER.CLIP_GRADIENTS
    assert clip.ENABLED and clip.CLIP_TYPE == "norm"
    assert lazy.train.clip_grad_norm == clip.CLIP_VALUE

    scheduler = build_lr_scheduler(recipe, expected)
    multiplier = instantiate(lazy.lr_multiplier)
    assert lazy.train.max_iter == recipe.SOLVER.MAX_ITER
    for iteration in range(600):
        lr = multiplier(iteration / lazy.train.max_iter) * lazy.optimizer.lr
        assert expected.param_groups[0]["lr"] == pytest.approx(lr)
        expected.step()
        scheduler.step()
    for name, key in (
        ("init_checkpoint", recipe.MODEL.WEIGHTS),
        ("eval_period", recipe.TEST.EVAL_PERIOD),
        ("seed", recipe.SEED),
    ):
        assert lazy.train[name] == key
    assert lazy.train.checkpointer.period == recipe.SOLVER.CHECKPOINT_PERIOD


def test_training_batches_are_those_of_the_recipe(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    options = "DATASETS.TRAIN ('shapes:lazy:2',) SOLVER.IMS_PER_BATCH 2 DATALOADER.NUM_WORKERS 0"
    recipe = load_cfg(YAML, options.split())
    lazy = LazyConfig.load(FILE)
    lazy.dataloader.train.dataset.names = "shapes:lazy:2"
    lazy.dataloader.train.update(total_batch_size=2, num_workers=0)
    loaders = instantiate(lazy.dataloader.train), build_train_loader(recipe)
    for batches in itertools.islice(zip(*loaders, strict=True), 3):
        for inputs, expected in zip(*batches, strict=True):
            assert torch.equal(inputs["image"], expected["image"])
            boxes, expected_boxes = (x["instances"].gt_boxes.tensor for x in (inputs, expected))
            assert torch.equal(boxes, expected_boxes)


def test_an_override_changes_the_model():
    cfg = tool.load_config(
        FILE,
        ["model.proposal_generator.head.num_classes=3", "model.backbone.out_channels=64"],
    )
    generator = instantiate(cfg.model).proposal_generator
    # The values that refer to them followed.
    assert generator.head.cls_score.weight.shape == (3, 64, 3, 3)
    assert generator.matcher.num_classes == 3


@pytest.mark.slow
def test_training_resumes_exactly_and_evaluates(small, tmp_path, one_thread):
    """Through the command; resumed after 2 of 4 iterations, with averaged weights."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    command = [sys.executable, str(ROOT / "tools" / "lazyconfig_train_net.py")]
    python_path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    subprocess.run(
        [*command, "--config-file", small, f"train.output_dir={whole}", "train.device=cpu"],
        env={**os.environ, "PYTHONPATH": python_path, "OMP_NUM_THREADS": "1"},
        check=True,
    )
    resumed.mkdir()
    shutil.copy(whole / "model_0000001.pth", resumed)
    (resumed / "last_checkpoint").write_text("model_0000001.pth")
    run(small, "--resume", f"train.output_dir={resumed}")

    final, other = load(whole / "model_final.pth"), load(resumed / "model_final.pth")
    assert final["iteration"] == other["iteration"] == 3
    assert len(final["class_names"]) == 6
    raw, other_raw = (x["trainer"]["hooks"]["EmaHook"]["raw"] for x in (final, other))
    for key, weight in final["model"].items():
        torch.testing.assert_close(weight, other["model"][key], rtol=0, atol=0)
        torch.testing.assert_close(raw[key], other_raw[key], rtol=0, atol=0)
    lines = [json.loads(line) for line in (resumed / "metrics.json").read_text().splitlines()]
    assert [line["iteration"] for line in lines if "total_loss" in line] == [2, 3]

    weights = f"train.init_checkpoint={whole / 'model_final.pth'}"
    run(small, "--eval-only", weights, f"train.output_dir={tmp_path / 'again'}")
    tables = [
        (folder / "inference" / "shapes_lazy_2" / "evaluation.json").read_text()
        for folder in (whole, resumed, tmp_path / "again")
    ]
    assert tables[0] == tables[1] == tables[2]
    assert (whole / "report.html").is_file()


def test_gradients_are_clipped_one_parameter_at_a_time():
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    tool.clip_gradients(optimizer, 5.0)
    parameters[0].grad, parameters[1].grad = torch.tensor([30.0, 40.0]), torch.tensor([0.3, 0.4])
    optimizer.step()
    torch.testing.assert_close(parameters[0].detach(), torch.tensor([-3.0, -4.0]))
    torch.testing.assert_close(parameters[1].detach(), torch.tensor([-0.3, -0.4]))


def test_another_number_of_classes_than_the_data_has(small, tmp_path):
    key = "model.proposal_generator.head.num_classes"
    with pytest.raises(ValueError, match=rf"{key} is 20, but shapes.* 6 classes .*set {key}=6"):
        run(small, f"{key}=20", f"train.output_dir={tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()


def test_yaml_files_and_lazy_configs_each_have_their_command():
    with pytest.raises(ValueError, match=r"has no model, dataloader.*recipes are for train_net.py"):
        tool.load_config(YAML, [])
    with pytest.raises(ValueError, match=r"fcos_r50_voc.py is a lazy config: .*lazyconfig_train"):
        load_cfg(FILE, [])
