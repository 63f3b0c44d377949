"""Real photographs and annotations, where they are at hand beside the project."""

from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from fcos_d2.checkpoint import FCOSCheckpointer
from fcos_d2.data import build_train_loader
from fcos_d2.engine import load_cfg, prepare_datasets

ROOT = Path(__file__).resolve().parents[1]
VOC = ROOT.parent / "shared" / "voc2007" / "VOC2007"
WEIGHTS = ROOT.parent / "shared" / "weights" / "resnet18_torchvision_bnfolded_conv1_to_layer3.pth"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (VOC.is_dir() and WEIGHTS.is_file()),
        reason="needs the VOC images and ResNet-18 weights in ../shared",
    ),
]


@pytest.fixture
def cfg():
    cfg = load_cfg(str(ROOT / "configs" / "FCOS_R18_VOC.yaml"), ["MODEL.DEVICE", "cpu"])
    cfg.MODEL.FPN.OUT_CHANNELS = 64
    cfg.MODEL.FCOS.NUM_CLS_CONVS = cfg.MODEL.FCOS.NUM_BOX_CONVS = 1
    cfg.DATASETS.TRAIN = (f"voc:{VOC}:train",)
    cfg.DATASETS.TEST = (f"voc:{VOC}:val",)
    cfg.INPUT.MIN_SIZE_TRAIN = (160,)
    cfg.SOLVER.IMS_PER_BATCH = 2
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SEED = 0
    prepare_datasets(cfg)
    return cfg


def test_training_on_voc_with_the_partial_resnet_learns(cfg, caplog):
    """Eight iterations on one batch: everything is finite, boxes are covered, the loss falls."""
    assert cfg.MODEL.FCOS.NUM_CLASSES == 20
    torch.manual_seed(0)
    model = build_model(cfg)
    with caplog.at_level("INFO", logger="fcos_d2"):
        FCOSCheckpointer(model).load(str(WEIGHTS), checkpointables=[])
    # The recipe ends with layer3, as the weights do.
    assert "so initialised: none." in caplog.text
    batch = next(iter(build_train_loader(cfg)))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    totals = []
    for _ in range(8):
        with EventStorage() as storage:
            losses = model(batch)
        assert all(loss.isfinite() for loss in losses.values())
        total = sum(losses.values())
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        totals.append(total.item())
    assert storage.latest()["fcos/gt_covered"][0] > 0.5
    assert totals[-1] < 0.8 * totals[0]
