"""Generated shapes: the same bytes every time, tight boxes, a valid VOC folder."""

import hashlib
import json

import numpy as np
import pytest
from PIL import Image

from fcos_d2.data import DataError, load_records, register_source, shapes
from fcos_d2.data.shapes import SHAPE_CLASSES, draw_image, make_shapes


@pytest.fixture(scope="module")
def drawn():
    """Forty images and their objects."""
    return [draw_image("train", index) for index in range(40)]


def hashes(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def test_same_bytes_in_two_places(tmp_path):
    first = hashes(make_shapes(tmp_path / "one", "train", 3))
    assert hashes(make_shapes(tmp_path / "two", "train", 3)) == first
    assert len(first) == 3 + 3 + 3  # images, annotations; split, classes.txt, shapes.json


def test_larger_count_keeps_the_first_images(tmp_path):
    few = hashes(make_shapes(tmp_path, "train", 2) / "JPEGImages")
    more = hashes(make_shapes(tmp_path, "train", 3) / "JPEGImages")
    assert few.items() < more.items()


def test_splits_differ(drawn):
    train = {image.tobytes() for image, _ in drawn[:5]}
    test = {draw_image("test", index)[0].tobytes() for index in range(5)}
    assert len(train | test) == 10


def test_boxes_are_tight_and_inside(drawn):
    for image, objects in drawn:
        height, width = image.shape[:2]
        for thing in objects:
            assert thing.mask.shape == (height, width)
            x0, y0, x1, y1 = thing.box
            assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height
            inside = np.zeros_like(thing.mask)
            inside[y0:y1, x0:x1] = True
            assert not (thing.mask & ~inside).any()
            for edge in (np.s_[y0, :], np.s_[y1 - 1, :], np.s_[:, x0], np.s_[:, x1 - 1]):
                assert thing.mask[edge].any()


def test_variety(drawn):
    """Sizes from 8 px to two thirds of the image, all classes, empty and crowded images."""
    sides = [
        (max(x1 - x0, y1 - y0), min(image.shape[:2]))
        for image, objects in drawn
        for x0, y0, x1, y1 in (thing.box for thing in objects)
    ]
    longer = [side for side, _ in sides]
    assert 7 <= min(longer) <= 10  # a pixel is lost where an edge covers less than half of it
    assert 80 <= max(longer)
    assert all(side <= 0.66 * shorter + 1 for side, shorter in sides)
    assert {thing.name for _, objects in drawn for thing in objects} == set(SHAPE_CLASSES)
    counts = [len(objects) for _, objects in drawn]
    assert min(counts) == 0 and max(counts) >= 6
    assert all(160 <= side <= 224 for image, _ in drawn for side in image.shape[:2])
    assert len({image.shape for image, _ in drawn}) > 30


def test_visible_and_difficult_by_brute_force(drawn):
    """An object is hidden by those that are drawn after it."""
    difficult = 0
    for _, objects in drawn:
        for number, thing in enumerate(objects):
            covered = np.zeros_like(thing.mask)
            for later in objects[number + 1 :]:
                covered |= later.mask
            hidden = (thing.mask & covered).sum() / thing.mask.sum()
            assert thing.visible == pytest.approx(1 - hidden)
            assert hidden <= 0.85 + 1e-9
            assert thing.difficult == (hidden > 0.5)
            difficult += thing.difficult
    assert difficult > 0


def test_is_a_voc_source(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    split = "train" + hashlib.sha256(str(tmp_path).encode()).hexdigest()[:8]  # a name of its own
    metadata = register_source(f"shapes:{split}:5")
    assert metadata.thing_classes == list(SHAPE_CLASSES)
    assert metadata.dirname == str(tmp_path / "shapes" / f"{split}_5")
    records = load_records(f"shapes:{split}:5")
    assert len(records) == 5
    for index, record in enumerate(records):
        image, objects = draw_image(split, index)
        assert (record["height"], record["width"]) == image.shape[:2]
        assert Image.open(record["file_name"]).size == (record["width"], record["height"])
        found = [
            (SHAPE_CLASSES[x["category_id"]], tuple(x["bbox"]), x["difficult"])
            for x in record["annotations"]
        ]
        assert found == [(thing.name, thing.box, thing.difficult) for thing in objects]


def test_second_call_writes_nothing(tmp_path, monkeypatch):
    folder = make_shapes(tmp_path, "train", 1)
    monkeypatch.setattr(shapes, "_write_folder", None)
    assert make_shapes(tmp_path, "train", 1) == folder


def test_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def draw(split, index):
        if index == 1:
            raise KeyboardInterrupt
        return draw_image(split, index)

    monkeypatch.setattr(shapes, "draw_image", draw)
    with pytest.raises(KeyboardInterrupt):
        make_shapes(tmp_path / "shapes", "train", 3)
    assert list((tmp_path / "shapes").iterdir()) == []
    monkeypatch.undo()
    assert len(list((make_shapes(tmp_path / "shapes", "train", 2) / "JPEGImages").iterdir())) == 2


def test_faster_process_wins(tmp_path, monkeypatch):
    """Another process finishes the same folder while this one draws."""
    write = shapes._write_folder

    def write_late(folder, split, count, recipe):
        write(folder, split, count, recipe)
        if not (tmp_path / "train_1").exists():
            (tmp_path / "train_1").mkdir()
            write(tmp_path / "train_1", split, count, recipe)

    monkeypatch.setattr(shapes, "_write_folder", write_late)
    assert make_shapes(tmp_path, "train", 1) == tmp_path / "train_1"
    assert [path.name for path in tmp_path.iterdir()] == ["train_1"]


@pytest.mark.parametrize("change", [{"version": 0}, None])
def test_folder_of_another_generator_is_an_error(tmp_path, change):
    folder = make_shapes(tmp_path, "train", 1)
    recipe = folder / "shapes.json"
    if change:
        recipe.write_text(json.dumps({**json.loads(recipe.read_text()), **change}))
    else:
        recipe.unlink()
    with pytest.raises(DataError, match="Delete the folder"):
        make_shapes(tmp_path, "train", 1)
