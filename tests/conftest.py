"""Fixtures that several tests share."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode, get_cfg

from fcos_d2 import add_fcos_config

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def tiny_cfg() -> CfgNode:
    """A full FCOS with a ResNet-18 and a narrow head, for 3 classes."""
    cfg = get_cfg()
    add_fcos_config(cfg)
    cfg.merge_from_file(str(ROOT / "configs" / "FCOS_Shapes.yaml"))
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.FCOS.NUM_CLASSES = 3
    cfg.MODEL.FCOS.NUM_CLS_CONVS = 1
    cfg.MODEL.FCOS.NUM_BOX_CONVS = 1
    cfg.DATALOADER.NUM_WORKERS = 0
    return cfg


@pytest.fixture
def torchrun():
    """Run a script in two processes on the CPU: ``torchrun(script, *arguments)``.

    All have one thread, this one too: sums in another order would have other last digits.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def run(script, *arguments, ok=True):
        command = (sys.executable, "-m", "torch.distributed.run", "--standalone")
        result = subprocess.run(
            [*command, "--nproc-per-node", "2", str(script), *map(str, arguments)],
            env={
                **os.environ,
                "CUDA_VISIBLE_DEVICES": "",
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=180,
        )
        assert (result.returncode == 0) == ok, result.stdout
        return result.stdout

    yield run
    torch.set_num_threads(num_threads)
