"""Fixtures that several tests share."""

import json
import os
import subprocess
import sys
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from PIL import Image

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
def one_thread():
    """Compute with one thread, as the processes that a test compares with.

    Sums in another order would have other last digits.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture
def torchrun(one_thread):
    """Run a script in two one-threaded processes on the CPU: ``torchrun(script, *arguments)``."""

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

    return run


class VocFolder:
    """Writes a VOC folder, image by image."""

    def __init__(self, path):
        self.path = path
        for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
            (path / part).mkdir(parents=True)

    def xml(self, name):
        return self.path / "Annotations" / f"{name}.xml"

    def image(self, name):
        return self.path / "JPEGImages" / f"{name}.jpg"

    def source(self, split=None):
        """The name of the folder as a data source."""
        return f"voc:{self.path}" + (f":{split}" if split else "")

    def add_image(self, file_name="a.jpg", size=(60, 40), color="black", exif_orientation=None):
        """Size is (width, height) before any rotation; a color may be an array (H, W, 3)."""
        is_array = isinstance(color, np.ndarray)
        image = Image.fromarray(color) if is_array else Image.new("RGB", size, color)
        exif = Image.Exif()
        if exif_orientation is not None:
            exif[0x0112] = exif_orientation
        image.save(self.path / "JPEGImages" / file_name, exif=exif)

    def add_xml(self, name, objects=(), size=(60, 40), filename=None, head="<annotation>"):
        """Each object is (name, "xmin ymin xmax ymax") or that and its difficult."""
        lines = [head, f"<filename>{escape(filename or name + '.jpg')}</filename>"]
        if size is not None:
            lines.append(f"<size><width>{size[0]}</width><height>{size[1]}</height></size>")
        for label, corners, *difficult in objects:
            lines.append(f"<object><name>{escape(label)}</name>")
            lines += [f"<difficult>{value}</difficult>" for value in difficult]
            tags = zip(("xmin", "ymin", "xmax", "ymax"), corners.split(), strict=False)
            box = "".join(f"<{tag}>{value}</{tag}>" for tag, value in tags)
            lines.append(f"<bndbox>{box}</bndbox></object>")
        self.xml(name).write_text("\n".join([*lines, "</annotation>"]))

    def add(self, name, objects=(), color="black", image_size=(60, 40), **options):
        """Add an image and its annotation, which states the image's size unless told otherwise."""
        if isinstance(color, np.ndarray):
            image_size = color.shape[1::-1]
        self.add_image(f"{name}.jpg", image_size, color)
        self.add_xml(name, objects, **{"size": image_size, **options})

    def add_split(self, split, text):
        path = self.path / "ImageSets" / "Main" / f"{split}.txt"
        path.write_text(text)
        return path


@pytest.fixture(scope="session")
def write_voc():
    """Make an empty VOC folder: ``write_voc(path)``."""
    return VocFolder


@pytest.fixture
def make_voc(tmp_path):
    """Make an empty VOC folder of a name."""
    return lambda name="mine": VocFolder(tmp_path / name)


@pytest.fixture
def voc(make_voc):
    return make_voc()


@pytest.fixture
def make_coco(tmp_path):
    """Write a COCO file and its images, and return the name of the source."""

    def make(images=None, annotations=(), categories=None, write_images=True):
        if images is None:
            images = [{"id": 7, "file_name": "a.jpg", "width": 60, "height": 40}]
        folder = tmp_path / "images"
        folder.mkdir(exist_ok=True)
        for image in images if write_images else ():
            Image.new("RGB", (image["width"], image["height"])).save(folder / image["file_name"])
        if categories is None:
            categories = [{"id": 90, "name": "zebra"}, {"id": 3, "name": "car"}]
        path = tmp_path / "annotations.json"
        content = {"images": images, "annotations": list(annotations), "categories": categories}
        path.write_text(json.dumps(content, indent=1))
        return f"coco:{path}:{folder}"

    return make
