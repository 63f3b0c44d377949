"""Pictures of the assignment: what is where, in which colour."""

from pathlib import Path

import numpy as np
import pytest
from detectron2.structures import BoxMode
from matplotlib.colors import to_rgb
from PIL import Image

from fcos_d2.data.inspection.assignment import assign_image
from fcos_d2.data.inspection.dataset_report import inspect_datasets
from fcos_d2.engine import load_cfg
from fcos_d2.visualization.overlays import (
    _COLORS,
    _GREEN,
    _GREY,
    _RED,
    draw_assignment,
    write_overlays,
)

CLASSES = ["car", "dog"]
ROOT = Path(__file__).resolve().parents[2]


def make_object(box, category=0, **flags):
    return {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": category, **flags}


@pytest.fixture
def record(tmp_path):
    """A black image of 160x96 with a real object, an ignored one, and one without a location."""
    path = tmp_path / "a.png"
    Image.new("RGB", (160, 96)).save(path)
    objects = [
        make_object([16.0, 16.0, 64.0, 64.0]),
        make_object([96.0, 16.0, 144.0, 64.0], 1, difficult=1),
        make_object([101.0, 77.0, 107.0, 83.0], 1),
    ]
    return {
        "file_name": str(path),
        "image_id": "a",
        "width": 160,
        "height": 96,
        "annotations": objects,
    }


@pytest.fixture
def cfg(tiny_cfg):
    tiny_cfg.INPUT.MIN_SIZE_TRAIN = (96,)
    return tiny_cfg


def is_close(picture, color):
    """(H, W): where the picture has about this colour."""
    distance = np.abs(picture.astype(int) - 255 * np.array(to_rgb(color)))
    return distance.max(axis=2) < 40


def test_each_location_is_a_dot_of_its_colour(record, cfg):
    picture = draw_assignment(record, cfg, class_names=CLASSES, scale=5)
    assert picture.shape[1:] == (800, 3) and picture.dtype == np.uint8
    assert picture.shape[0] > 480  # the legend is below
    image = assign_image(record, cfg)
    assert np.bincount(image.box_of_point, minlength=3).tolist() == [4, 4, 0]
    for point, level, box in zip(image.points, image.levels, image.box_of_point, strict=True):
        color = _GREY if image.ignored[box] else _COLORS[level]
        x, y = (5 * point).round().astype(int)
        assert is_close(picture[y : y + 1, x : x + 1], color).all(), (point, color)


def test_boxes_have_the_colour_of_what_becomes_of_them(record, cfg):
    """Along the upper side of each box; labels are above it."""
    picture = draw_assignment(record, cfg, class_names=CLASSES, scale=5)
    for box, color, other in ((0, _GREEN, _RED), (1, _GREY, _RED), (2, _RED, _GREEN)):
        x0, y0, x1, _ = (int(5 * v) for v in record["annotations"][box]["bbox"])
        line = picture[y0 - 1 : y0 + 2, x0:x1]
        share = is_close(line, color).any(axis=0).mean()
        # Dashes leave gaps.
        assert (share > 0.95) if box == 0 else (0.3 < share < 0.95)
        assert not is_close(line, other).any()


def test_size_is_the_networks_and_small_pictures_are_enlarged(record, cfg):
    plain = draw_assignment(record, cfg, min_size=192, scale=1)
    assert plain.shape[1] == 240  # INPUT.MAX_SIZE_TRAIN: 240 for 320
    assert draw_assignment(record, cfg, min_size=96).shape[1] == 800  # 480 is 5 times 96
    cfg.INPUT.MAX_SIZE_TRAIN = 1333
    assert draw_assignment(record, cfg, min_size=600).shape[1] == 1000


def test_image_without_objects(record, cfg):
    record["annotations"] = []
    picture = draw_assignment(record, cfg)
    assert not picture[:480].any()
    assert picture[480:].any()


def test_missing_image(record, cfg):
    record["file_name"] += ".gone"
    with pytest.raises(FileNotFoundError, match="gone"):
        draw_assignment(record, cfg)


@pytest.fixture
def source(make_coco, tmp_path):
    """COCO data of three images of 80x60; of one the file says 85x60, another is broken."""
    images = [
        {"id": i, "file_name": f"{name}.png", "width": 80, "height": 60}
        for i, name in enumerate(("wrong size", "broken", "good"))
    ]
    box = {"category_id": 3, "bbox": [10, 10, 40, 30], "iscrowd": 0}
    name = make_coco(images, [{"id": i, "image_id": i, **box} for i in range(3)])
    Image.new("RGB", (85, 60)).save(tmp_path / "images" / "wrong size.png")
    (tmp_path / "images" / "broken.png").write_bytes(b"no image")
    return name


def test_images_that_cannot_be_drawn_are_skipped(source, tmp_path, caplog):
    cfg = load_cfg(str(ROOT / "configs" / "FCOS_Shapes.yaml"), ["MODEL.DEVICE", "cpu"])
    report = inspect_datasets(cfg, [source], [])
    assert {x.kind for x in report.findings if x.severity == "error"} == {"image size", "bad image"}
    (picture,) = write_overlays(report, cfg, tmp_path / "pictures")
    assert picture.name.endswith("_2.png") and picture.is_file()
    assert "wrong size.png (Mismatched image shape" in caplog.text
    assert "broken.png (" in caplog.text


def test_the_command_still_says_that_there_are_errors(source, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import check_dataset

    config = ("--config-file", str(ROOT / "configs" / "FCOS_Shapes.yaml"))
    assert check_dataset.main([source, *config, "--overlays", str(tmp_path / "pictures")]) == 1
    assert capsys.readouterr().out.endswith("_2.png\n")
