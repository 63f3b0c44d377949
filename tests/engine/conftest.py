"""A tiny VOC folder, the command line that trains on it, and helpers for runs."""

import argparse
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from fcos_d2.engine import load_cfg, prepare_datasets

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def write_voc_folder(write_voc):
    """Write a VOC folder: ``write_voc_folder(path, count, classes)``.

    Each image has one bright rectangle; the class is its colour.
    """

    def write(path, count=6, classes=("ball", "box")):
        voc, rng = write_voc(path), np.random.default_rng(0)
        for k in range(count):
            image = rng.integers(0, 60, (64 + 8 * (k % 2), 80, 3), dtype=np.uint8)
            x, y = rng.integers(2, 30, 2)
            image[y : y + 28, x : x + 32, k % 3] = 250
            box = f"{x + 1} {y + 1} {x + 32} {y + 28}"
            voc.add(f"{k:03d}", [(classes[k % len(classes)], box)], image)
        voc.add_split("train", "".join(f"{k:03d}\n" for k in range(count)))
        return path

    return write


@pytest.fixture
def voc_folder(tmp_path, write_voc_folder):
    """A folder of six images and the classes ball and box."""
    return write_voc_folder(tmp_path / "data")


@pytest.fixture
def make_args(voc_folder, tmp_path):
    """Arguments of train_net.py for a tiny model; KEY VALUE pairs come last."""

    def make(*opts, output="out", **flags):
        source = f"('voc:{voc_folder}:train',)"
        base = {
            "DATASETS.TRAIN": source,
            "DATASETS.TEST": source,
            "OUTPUT_DIR": str(tmp_path / output),
            "MODEL.DEVICE": "cpu",
            "MODEL.FCOS.NUM_CLS_CONVS": "1",
            "MODEL.FCOS.NUM_BOX_CONVS": "1",
            "INPUT.MIN_SIZE_TRAIN": "(64, 72)",
            "INPUT.MIN_SIZE_TEST": "64",
            "SOLVER.IMS_PER_BATCH": "2",
            "SOLVER.REFERENCE_IMS_PER_BATCH": "2",
            "DATALOADER.NUM_WORKERS": "0",
            "TEST.EVAL_PERIOD": "0",
        }
        return argparse.Namespace(
            config_file=str(ROOT / "configs" / "FCOS_Shapes.yaml"),
            opts=[x for pair in base.items() for x in pair] + list(opts),
            **{"resume": False, "eval_only": False, **flags},
        )

    return make


@pytest.fixture
def prepare():
    """Build the config as ``setup`` does, without its slow look at the machine."""

    def run(args):
        cfg = load_cfg(args.config_file, args.opts)
        prepare_datasets(cfg, args.eval_only)
        os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
        return cfg

    return run


@pytest.fixture
def interrupt():
    """Train up to an iteration, then press Ctrl-C: ``interrupt(trainer, iteration)``."""

    def run(trainer, iteration):
        step = trainer.run_step

        def run_step():
            if trainer.iter == iteration:
                raise KeyboardInterrupt
            step()

        trainer.run_step = run_step
        with pytest.raises(KeyboardInterrupt):
            trainer.train()

    return run


@pytest.fixture
def load():
    """Load a checkpoint of a run: ``load(cfg, "model_final")``."""
    return lambda cfg, name: torch.load(
        os.path.join(cfg.OUTPUT_DIR, f"{name}.pth"), weights_only=True
    )


@pytest.fixture
def assert_equal():
    """Assert that two dicts of tensors are equal to the last bit."""

    def check(one, other):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert torch.equal(value, other[key]), key

    return check
