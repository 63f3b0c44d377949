"""A tiny VOC folder to train on, and the command line that trains on it."""

import argparse
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


def _write_voc_folder(folder: Path, count: int = 6, classes=("ball", "box")) -> Path:
    """Write images with one bright rectangle each; the class is its colour."""
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / part).mkdir(parents=True)
    rng = np.random.default_rng(0)
    names = [f"{k:03d}" for k in range(count)]
    for k, name in enumerate(names):
        image = rng.integers(0, 60, (64 + 8 * (k % 2), 80, 3), dtype=np.uint8)
        x, y = rng.integers(2, 30, 2)
        image[y : y + 28, x : x + 32, k % 3] = 250
        Image.fromarray(image).save(folder / "JPEGImages" / f"{name}.jpg")
        root = ET.Element("annotation")
        ET.SubElement(root, "filename").text = f"{name}.jpg"
        thing = ET.SubElement(root, "object")
        ET.SubElement(thing, "name").text = classes[k % len(classes)]
        box = ET.SubElement(thing, "bndbox")
        for tag, value in zip(
            ("xmin", "ymin", "xmax", "ymax"), (x + 1, y + 1, x + 32, y + 28), strict=True
        ):
            ET.SubElement(box, tag).text = str(value)
        ET.ElementTree(root).write(folder / "Annotations" / f"{name}.xml")
    (folder / "ImageSets" / "Main" / "train.txt").write_text("\n".join(names) + "\n")
    return folder


@pytest.fixture
def write_voc_folder():
    """Write a VOC folder: ``write_voc_folder(path, count, classes)``."""
    return _write_voc_folder


@pytest.fixture
def voc_folder(tmp_path):
    """A folder of six images and the classes ball and box."""
    return _write_voc_folder(tmp_path / "data")


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
