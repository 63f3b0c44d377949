"""A lazy config builds the model of its yaml recipe, and every command takes it."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from detectron2.config import LazyConfig, get_cfg, instantiate
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from fcos_d2 import add_fcos_config
from fcos_d2.engine import Trainer, evaluate, load_cfg, setup
from fcos_d2.engine.lazy import merge_config, split_overrides
from fcos_d2.engine.predict import Predictor

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "configs" / "lazy" / "fcos_r50_voc.py"
YAML = ROOT / "configs" / "FCOS_R50_VOC.yaml"


def read(config_file, *opts):
    cfg = get_cfg()
    add_fcos_config(cfg)
    merge_config(cfg, str(config_file), opts)
    cfg.MODEL.DEVICE = "cpu"
    return cfg


@pytest.fixture(scope="module")
def models():
    """The model of the lazy file, that of the yaml recipe, and that which load_cfg makes of it."""
    return {
        "lazy": instantiate(LazyConfig.load(str(FILE)).model),
        "yaml": build_model(read(YAML)),
        "text": build_model(read(FILE)),
    }


@pytest.mark.parametrize("name", ["lazy", "text"])
def test_the_model_is_that_of_the_recipe(models, name):
    one, other = models[name], models["yaml"]
    assert repr(one) == repr(other)  # every layer with its options
    assert {k: v.shape for k, v in one.state_dict().items()} == {
        k: v.shape for k, v in other.state_dict().items()
    }
    frozen, other_frozen = (
        [k for k, p in m.named_parameters() if not p.requires_grad] for m in (one, other)
    )
    assert frozen == other_frozen and any("res2" in key for key in frozen)
    for part in ("decoder", "matcher"):
        assert vars(getattr(one.proposal_generator, part)) == vars(
            getattr(other.proposal_generator, part)
        )
    for option in ("loss_options", "strides", "location_offset", "location_step"):
        assert getattr(one.proposal_generator, option) == getattr(other.proposal_generator, option)
    assert (one.input_format, one.vis_period) == (other.input_format, other.vis_period)


@pytest.mark.parametrize("source, target", [("yaml", "lazy"), ("lazy", "yaml"), ("yaml", "text")])
def test_weights_go_both_ways(models, source, target):
    """The same weights give the same losses and detections, to the last bit."""
    one, other = models[source], models[target]
    torch.nn.init.normal_(one.proposal_generator.head.cls_score.weight, std=0.1)
    other.load_state_dict(one.state_dict())
    instances = Instances((96, 120), gt_boxes=Boxes(torch.tensor([[8.0, 8.0, 60.0, 70.0]])))
    instances.gt_classes = torch.tensor([5])
    batch = [{"image": torch.randint(0, 256, (3, 96, 120)), "instances": instances}]
    with torch.no_grad(), EventStorage():
        losses, other_losses = (model.train()(batch) for model in (one, other))
        (found,), (other_found,) = (model.eval()(batch) for model in (one, other))
    assert losses == other_losses and len(losses) == 3
    found, other_found = found["instances"], other_found["instances"]
    assert len(found) > 10
    assert torch.equal(found.pred_boxes.tensor, other_found.pred_boxes.tensor)
    assert torch.equal(found.scores, other_found.scores)
    assert torch.equal(found.pred_classes, other_found.pred_classes)


def test_all_but_the_model_is_the_recipes():
    lazy, recipe = read(FILE), read(YAML)
    for node in ("SOLVER", "INPUT", "DATASETS", "DATALOADER", "TEST", "OUTPUT_DIR", "SEED"):
        assert lazy[node] == recipe[node], node
    assert lazy.MODEL.WEIGHTS == recipe.MODEL.WEIGHTS
    assert lazy.MODEL.FCOS.NUM_CLASSES == 20


def test_overrides_of_both_kinds():
    cfg = read(
        *(FILE, "SOLVER.MAX_ITER", "7", "model.proposal_generator.head.num_classes=3"),
        *("MODEL.WEIGHTS", "", "model.backbone.out_channels=64", "INPUT.FORMAT", "RGB"),
        *("model.proposal_generator.box_loss=ciou", "model.input_format=RGB"),
    )
    assert cfg.SOLVER.MAX_ITER == 7 and cfg.MODEL.WEIGHTS == "" and cfg.MODEL.FCOS.NUM_CLASSES == 3
    generator = build_model(cfg).proposal_generator
    # What is written in terms of them followed.
    assert generator.head.cls_score.weight.shape == (3, 64, 3, 3)
    assert generator.matcher.num_classes == 3
    assert generator.loss_options["box_loss_kind"] == "ciou"


@pytest.mark.parametrize(
    "opts, pairs, overrides",
    [
        ([], [], []),
        (["A.B", "1", "model.x=2", "C", "d"], ["A.B", "1", "C", "d"], ["model.x=2"]),
        (["OUTPUT_DIR", "model.x=2"], ["OUTPUT_DIR", "model.x=2"], []),
        (["model.x.y=a=b", "model.z=[1,2]"], [], ["model.x.y=a=b", "model.z=[1,2]"]),
        (["A", "", "model.a=1", "B"], ["A", "", "B"], ["model.a=1"]),
    ],
)
def test_split_overrides(opts, pairs, overrides):
    assert split_overrides(opts) == (pairs, overrides)


def test_a_key_without_a_value():
    with pytest.raises(AssertionError, match="pairs|odd|even"):
        read(FILE, "model.input_format=BGR", "SOLVER.MAX_ITER")


@pytest.mark.parametrize(
    "opts, message",
    [
        (["MODEL.FCOS.NORM", ""], r"MODEL.FCOS.NORM has no effect: .*fcos_r50_voc.py.*model.x.y"),
        (["MODEL.FCOS.NUM_CLASSES", "3"], r"NUM_CLASSES has no effect"),
        (["TEST.DETECTIONS_PER_IMAGE", "3"], "DETECTIONS_PER_IMAGE has no effect"),
        (["INPUT.FORMAT", "RGB"], r"model.input_format is 'BGR', but INPUT.FORMAT .*'RGB'"),
        (["model.backbone=["], r"model.backbone=\[ can't be applied to .*fcos_r50_voc.py"),
        (["model.input_format.x=1"], r"model.input_format.x=1 can't be applied to"),
        (["model._target_=fcos_d2.nobody"], "calls nobody, which can't be imported"),
        (["model.proposal_generator.head.num_classes=null"], r"has no model.*head.num_classes"),
    ],
)
def test_keys_that_do_not_fit_the_model(opts, message):
    with pytest.raises(ValueError, match=message):
        read(FILE, *opts)


def test_overrides_of_a_yaml_file():
    with pytest.raises(ValueError, match="model.x=1 is for a --config-file that ends in .py"):
        read(YAML, "model.x=1")


def test_another_number_of_classes_than_the_model_has():
    cfg = read(FILE)
    cfg.MODEL.FCOS.NUM_CLASSES = 3  # as those of a checkpoint are
    with pytest.raises(ValueError, match=r"20 classes, but 3 .*head.num_classes=3"):
        build_model(cfg)


def test_levels_that_the_backbone_does_not_have():
    for override, message in (
        ("strides=[8,16,32,64,100]", "p7 with stride 100, but the backbone .*'p7': 128"),
        ("in_features=[p2,p3,p4,p5,p6]", "p2 with stride 8, but the backbone"),
    ):
        with pytest.raises(ValueError, match=message):
            build_model(read(FILE, f"model.proposal_generator.{override}"))


def test_no_model_to_build():
    cfg = read(YAML)
    cfg.MODEL.META_ARCHITECTURE = "LazyModel"
    with pytest.raises(ValueError, match="MODEL.LAZY is empty"):
        build_model(cfg)


HEADER = "from detectron2.config import LazyCall as L\nfrom fcos_d2.modeling import FCOS\n"


@pytest.mark.parametrize(
    "text, error, message",
    [
        ("recipe = 'a.yaml'\n", ValueError, "lazy.py has no 'model'.*LazyCall of"),
        ("model = {}\n", ValueError, "lazy.py has no 'recipe'"),
        ("model = {}\nrecipe = 'gone.yaml'\n", FileNotFoundError, "lazy.py: its .*gone.yaml"),
        ("model = (\n", SyntaxError, "lazy.py"),
        (
            HEADER + "model = L(FCOS)(f=lambda x: x)\nrecipe = 'a.yaml'\n",
            ValueError,
            "lazy.py: its `model` can't be written as YAML",
        ),
        (
            HEADER + "model = L(FCOS)(f=open('a.yaml'))\nrecipe = 'a.yaml'\n",
            ValueError,
            "lazy.py: its `model` can't be written as YAML",
        ),
        (
            HEADER + "class MyFCOS(FCOS): ...\nmodel = L(MyFCOS)()\nrecipe = 'a.yaml'\n",
            ValueError,
            "lazy.py calls MyFCOS, which can't be imported",
        ),
        (HEADER + "model = L(FCOS)(a=1)\nrecipe = 'a.yaml'\n", ValueError, "has no model.prop"),
    ],
)
def test_files_that_are_no_lazy_config(tmp_path, monkeypatch, text, error, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text(f'_BASE_: "{YAML}"\n')
    (tmp_path / "lazy.py").write_text(text)
    with pytest.raises(error, match=message):
        read(tmp_path / "lazy.py")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.py: no such file"):
        read(tmp_path / "gone.py")


def test_another_meta_architecture():
    cfg = read(FILE, "model._target_=types.SimpleNamespace")
    with pytest.raises(ValueError, match="has to be an FCOS, not a SimpleNamespace"):
        build_model(cfg)


@pytest.fixture
def small_file(tmp_path):
    """A lazy config as users write it: another one, changed."""
    path = tmp_path / "small.py"
    path.write_text(
        "from detectron2.config import LazyConfig\n"
        f"model = LazyConfig.load({str(FILE)!r}, 'model')\n"
        "model.backbone.bottom_up.freeze_at = 0\n"
        "model.backbone.bottom_up.stages.depth = 18\n"
        "del model.backbone.bottom_up.stages.stride_in_1x1\n"
        "model.backbone.out_channels = 64\n"
        "for part in ('num_cls_convs', 'num_box_convs'):\n"
        "    model.proposal_generator.head[part] = 1\n"
        "recipe = 'small.yaml'\n"
    )
    recipe = ROOT / "configs" / "FCOS_Shapes.yaml"
    (tmp_path / "small.yaml").write_text(f'_BASE_: "{recipe}"\nINPUT:\n  MIN_SIZE_TEST: 64\n')
    return path


def arguments(config_file, folder, *opts, eval_only=False, resume=False):
    base = "MODEL.DEVICE cpu INPUT.MIN_SIZE_TRAIN (64,) SOLVER.IMS_PER_BATCH 2 TEST.EVAL_PERIOD 0 "
    base += "SOLVER.REFERENCE_IMS_PER_BATCH 2 DATALOADER.NUM_WORKERS 0"
    data = ("DATASETS.TRAIN", "('shapes:lazy:4',)", "DATASETS.TEST", "('shapes:lazy:4',)")
    return argparse.Namespace(
        config_file=str(config_file),
        opts=[*base.split(), *data, "OUTPUT_DIR", str(folder), *opts],
        eval_only=eval_only,
        resume=resume,
    )


def test_training_evaluation_and_prediction(small_file, tmp_path, monkeypatch):
    """All as with a yaml recipe; the dumped config alone is enough afterwards."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    classes = "model.proposal_generator.head.num_classes={}".format
    with pytest.raises(ValueError, match=r"head.num_classes is 20, but .* 6 classes.*_classes=6"):
        setup(arguments(small_file, tmp_path / "out"))
    assert not (tmp_path / "out").exists()

    # An override in front of a key that is set by hand: the schedule keeps to the latter.
    opts = (classes(6), "SOLVER.MAX_ITER", "2", "SOLVER.REFERENCE_IMS_PER_BATCH", "4")
    cfg = setup(arguments(small_file, tmp_path / "out", *opts))
    assert cfg.SOLVER.MAX_ITER == 2
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()

    weights = ("MODEL.WEIGHTS", str(tmp_path / "out" / "model_final.pth"))
    evaluate(setup(arguments(small_file, tmp_path / "again", *opts, *weights, eval_only=True)))
    table = Path("inference", "shapes_lazy_4", "evaluation.json")
    tables = [json.loads((tmp_path / name / table).read_text()) for name in ("out", "again")]
    assert tables[0].pop("model") != tables[1].pop("model") and tables[0] == tables[1]

    dumped = load_cfg(str(tmp_path / "out" / "config.yaml"), list(weights))
    assert dumped.MODEL.LAZY == cfg.MODEL.LAZY
    image = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8).numpy()
    found = [kind(dumped)(image)["instances"].scores for kind in (DefaultPredictor, Predictor)]
    assert len(found[0]) and torch.equal(*found)
    with pytest.raises(ValueError, match=r"20 classes, but 6 .*num_classes=6"):
        Predictor(load_cfg(str(small_file), list(weights)))
