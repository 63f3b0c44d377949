"""The two-stage recipe, shrunk: from command line arguments to the tables."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model

from fcos_d2.engine import Trainer, evaluate, load_cfg, setup
from fcos_d2.engine.predict import Predictor

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "configs" / "FasterRCNN_FCOS_R50_VOC.yaml"

# A ResNet-18 from scratch on images of 64 pixels, and heads to match.
SMALL = {
    "MODEL.DEVICE": "cpu",
    "MODEL.WEIGHTS": "''",
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.RESNETS.DEPTH": 18,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
    "MODEL.RESNETS.NORM": "GN",
    "MODEL.FPN.OUT_CHANNELS": 64,
    "MODEL.FCOS.NUM_CLS_CONVS": 1,
    "MODEL.FCOS.NUM_BOX_CONVS": 1,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 64,
    "INPUT.MIN_SIZE_TRAIN": "(64,)",
    "INPUT.MIN_SIZE_TEST": 64,
    "DATASETS.TRAIN": "('shapes:train:6',)",
    "DATASETS.TEST": "('shapes:test:4',)",
    "DATALOADER.NUM_WORKERS": 0,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.REFERENCE_IMS_PER_BATCH": 2,
    "SOLVER.MAX_ITER": 3,
    "TEST.EVAL_PERIOD": 0,
}


@pytest.fixture
def make_args(tmp_path, monkeypatch):
    """Arguments of train_net.py for the recipe, shrunk; KEY VALUE pairs come last."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))

    def make(*opts, output="out", eval_only=False):
        keys = {**SMALL, "OUTPUT_DIR": str(tmp_path / output)}
        pairs = [str(x) for pair in keys.items() for x in pair]
        return argparse.Namespace(
            config_file=str(RECIPE), opts=[*pairs, *opts], eval_only=eval_only, resume=False
        )

    return make


def train(args):
    cfg = setup(args)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    return cfg


def last_metrics(cfg):
    return {
        key: value
        for line in (Path(cfg.OUTPUT_DIR) / "metrics.json").read_text().splitlines()
        for key, value in json.loads(line).items()
    }


def test_the_recipe_as_it_is():
    """The limits of proposals are Detectron2's for FPN models; the rest is FCOS_R50_VOC's."""
    cfg = load_cfg(str(RECIPE), ["MODEL.DEVICE", "cpu"])
    rpn = cfg.MODEL.RPN
    assert (rpn.PRE_NMS_TOPK_TRAIN, rpn.PRE_NMS_TOPK_TEST) == (2000, 1000)
    assert (rpn.POST_NMS_TOPK_TRAIN, rpn.POST_NMS_TOPK_TEST) == (1000, 1000)
    plain = load_cfg(str(RECIPE.with_name("FCOS_R50_VOC.yaml")), ["MODEL.DEVICE", "cpu"])
    assert cfg.SOLVER == plain.SOLVER and cfg.DATASETS == plain.DATASETS
    assert cfg.MODEL.WEIGHTS == plain.MODEL.WEIGHTS
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 20
    model = build_model(cfg)
    assert model.proposal_generator.head.cls_score.out_channels == 1
    assert model.roi_heads.box_predictor.cls_score.out_features == 20 + 1
    pooler = model.roi_heads.box_pooler
    assert (pooler.min_level, pooler.max_level) == (3, 5)


@pytest.mark.slow
def test_faster_rcnn_from_setup_to_tables(make_args, tmp_path):
    cfg = train(make_args())
    assert cfg.MODEL.FCOS.NUM_CLASSES == cfg.MODEL.ROI_HEADS.NUM_CLASSES == 6
    metrics = last_metrics(cfg)
    assert {"loss_cls", "loss_box_reg", "loss_fcos_cls", "loss_fcos_box", "loss_fcos_ctr"} <= set(
        metrics
    )
    weights = ("MODEL.WEIGHTS", str(tmp_path / "out" / "model_final.pth"))
    again = evaluate(setup(make_args(*weights, output="again", eval_only=True)))
    assert {"bbox", "voc"} == set(again)
    table = Path("inference", "shapes_test_4", "evaluation.json")
    tables = [json.loads((tmp_path / name / table).read_text()) for name in ("out", "again")]
    assert tables[0].pop("model") != tables[1].pop("model") and tables[0] == tables[1]

    # The number of classes is that of the checkpoint, for both heads.
    predictor = Predictor(load_cfg(str(RECIPE), make_args(*weights).opts))
    image = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8).numpy()
    assert predictor.model.roi_heads.num_classes == 6
    assert predictor(image)["instances"].has("pred_boxes")


def test_proposal_network_from_setup_to_recall(make_args, tmp_path):
    cfg = train(make_args("MODEL.META_ARCHITECTURE", "ProposalNetwork"))
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == -1
    metrics = last_metrics(cfg)
    assert "loss_cls" not in metrics and "loss_fcos_cls" in metrics
    assert 0 <= metrics["box_proposals/AR@100"] <= metrics["box_proposals/AR@1000"] <= 100
    folder = tmp_path / "out" / "inference" / "shapes_test_4"
    assert (folder / "ground_truth.json").is_file() and (folder / "box_proposals.pkl").is_file()


def test_ignored_objects_are_refused(make_args, tmp_path):
    with pytest.raises(ValueError, match="INPUT.DIFFICULT is 'ignore'"):
        setup(make_args("INPUT.DIFFICULT", "ignore"))
    assert not (tmp_path / "out").exists()


def test_proposals_are_not_drawn(make_args):
    cfg = load_cfg(str(RECIPE), make_args("MODEL.META_ARCHITECTURE", "ProposalNetwork").opts)
    with pytest.raises(ValueError, match="gives proposals, not detections"):
        Predictor(cfg)
