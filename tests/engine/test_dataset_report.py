"""Pictures of the training locations, of data with faults too."""

import json
from pathlib import Path

import pytest
from PIL import Image

from fcos_d2.engine.dataset_report import inspect_datasets, write_overlays
from fcos_d2.engine.setup import load_cfg

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def source(tmp_path):
    """COCO data of three images of 80x60; of one the file says 85x60, another is broken."""
    (tmp_path / "images").mkdir()
    for name in ("wrong size", "good", "broken"):
        Image.new("RGB", (80, 60), "gray").save(tmp_path / "images" / f"{name}.png")
    (tmp_path / "images" / "broken.png").write_bytes(b"no image")
    content = {
        "images": [
            {"id": i, "file_name": f"{name}.png", "width": width, "height": 60}
            for i, (name, width) in enumerate([("wrong size", 85), ("broken", 80), ("good", 80)])
        ],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 1, "bbox": [10, 10, 40, 30], "iscrowd": 0}
            for i in range(3)
        ],
        "categories": [{"id": 1, "name": "car"}],
    }
    (tmp_path / "data.json").write_text(json.dumps(content))
    return f"coco:{tmp_path / 'data.json'}:{tmp_path / 'images'}"


def test_images_that_cannot_be_drawn_are_passed_over(source, tmp_path, caplog):
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
