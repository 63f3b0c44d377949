"""The grid of detections beside ground truth."""

import logging

import numpy as np
import pytest
from detectron2.structures import BoxMode
from PIL import Image

from fcos_d2.visualization import draw_detection_grid
from fcos_d2.visualization.detections import class_color, draw_ground_truth, draw_predictions

NAMES = ["cat", "dog"]
SIZES = [(120, 80), (60, 150), (700, 90), (33, 33)]  # width, height


@pytest.fixture
def records(tmp_path):
    """Four images of different sizes with one object each; the second one's is difficult."""
    rng, made = np.random.default_rng(0), []
    for i, (width, height) in enumerate(SIZES):
        path = tmp_path / "images" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        annotation = {
            "bbox": [5, 5, 30, 30],
            "bbox_mode": BoxMode.XYXY_ABS,
            "category_id": i % 2,
            "difficult": int(i == 1),
            "iscrowd": 0,
        }
        made.append(
            {
                "file_name": str(path),
                "image_id": f"image{i}",
                "width": width,
                "height": height,
                "annotations": [annotation],
            }
        )
    return made


@pytest.fixture
def predictions():
    """One sure and one unsure prediction an image."""
    return [
        {"image_id": f"image{i}", "category_id": i % 2, "bbox": [4, 6, 25, 20], "score": score}
        for i in range(4)
        for score in (0.9, 0.1)
    ]


def is_color(pixels, category):
    """Which pixels (..., 3) have the colour of a class, about."""
    return np.abs(pixels / 255.0 - np.array(class_color(category))).max(axis=-1) < 0.15


def test_the_grid_is_the_same_every_time(tmp_path, records, predictions):
    pictures = [tmp_path / "a.png", tmp_path / "b.png"]
    for picture in pictures:
        draw_detection_grid(records, predictions, NAMES, picture, max_images=3)
    assert pictures[0].read_bytes() == pictures[1].read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", "b.png", "images"}


def test_the_seed_chooses_the_images(tmp_path, records):
    """One of four images, by eight seeds: more than one picture comes out."""
    pictures = set()
    for seed in range(8):
        draw_detection_grid(records, [], NAMES, tmp_path / "a.png", max_images=1, seed=seed)
        pictures.add((tmp_path / "a.png").read_bytes())
    assert 1 < len(pictures) <= 4


def test_unsure_predictions_and_foreign_images_are_not_drawn(tmp_path, records, predictions):
    picture, other = tmp_path / "a.png", tmp_path / "b.png"
    sure = [prediction for prediction in predictions if prediction["score"] > 0.5]
    foreign = [dict(sure[0], image_id="elsewhere")]
    draw_detection_grid(records, predictions, NAMES, picture, score_threshold=0.5)
    draw_detection_grid(records, sure + foreign, NAMES, other, score_threshold=0.5)
    assert np.array_equal(Image.open(picture), Image.open(other))
    draw_detection_grid(records, predictions, NAMES, other, score_threshold=0.05)
    assert not np.array_equal(Image.open(picture), Image.open(other))


def test_a_missing_and_a_broken_image_are_named_and_replaced(
    tmp_path, records, predictions, caplog
):
    records[0]["file_name"] = str(tmp_path / "gone.jpg")
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no picture")
    records[1]["file_name"] = str(broken)
    with caplog.at_level(logging.WARNING, logger="fcos_d2"):
        draw_detection_grid(records, predictions, NAMES, tmp_path / "a.png")
    assert "gone.jpg" in caplog.text and "broken.jpg" in caplog.text
    draw_detection_grid(records[2:], predictions, NAMES, tmp_path / "b.png")
    assert np.array_equal(Image.open(tmp_path / "a.png"), Image.open(tmp_path / "b.png"))


def test_nothing_to_draw_is_an_error_and_leaves_no_file(tmp_path, records, predictions):
    for record in records:
        record["file_name"] = str(tmp_path / "gone.jpg")
    for given in (records, []):
        with pytest.raises(ValueError, match="none of the images"):
            draw_detection_grid(given, predictions, NAMES, tmp_path / "a.png")
    with pytest.raises(ValueError, match="class id 1.*1 classes"):
        draw_detection_grid(records, predictions, ["cat"], tmp_path / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_images_without_objects_and_predictions(tmp_path, records):
    for record in records:
        record["annotations"] = []
    draw_detection_grid(records, [], NAMES, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_boxes_stand_where_they_should_in_a_scaled_image():
    """The record has 50 x 50 pixels, the picture 200 x 200: x = 10 is drawn at 40."""
    record = {"width": 50, "height": 50}
    prediction = {"category_id": 1, "bbox": [10, 5, 30, 40], "score": 0.87}
    black = np.zeros((200, 200, 3), np.uint8)
    drawn = draw_predictions(black, record, [prediction], NAMES)
    assert drawn.shape == black.shape and drawn.dtype == np.uint8
    rows, columns = np.nonzero(is_color(drawn, 1))
    assert abs(columns.min() - 40) <= 3 and abs(columns.max() - 160) <= 3
    assert abs(rows.min() - 20) <= 3 and abs(rows.max() - 180) <= 3


def test_a_class_has_one_colour_and_difficult_is_dashed():
    """The left edge of a difficult box has gaps; an ordinary one and a prediction have none."""
    black, edges = np.zeros((200, 200, 3), np.uint8), {}
    annotation = {"bbox": [60, 20, 160, 180], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    for difficult in (0, 1):
        record = {"width": 200, "height": 200, "annotations": [{**annotation}]}
        record["annotations"][0]["difficult"] = difficult
        truth = draw_ground_truth(black, record, NAMES)
        edges[difficult] = is_color(truth[60:170, 58:63], 0).any(axis=1).mean()
    prediction = {"category_id": 0, "bbox": [60, 20, 100, 160], "score": 0.9}
    predicted = draw_predictions(black, record, [prediction], NAMES)
    assert edges[0] == 1.0 and 0.4 < edges[1] < 0.9
    assert is_color(predicted[60:170, 58:63], 0).any(axis=1).all()


def test_a_class_name_is_no_formula():
    """Between two $ matplotlib reads maths, and x_^ is none."""
    black = np.zeros((60, 80, 3), np.uint8)
    item = {"bbox": [10, 10, 60, 40], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    record = {"height": 60, "width": 80, "annotations": [item]}
    assert draw_ground_truth(black, record, ["5$ x_^$"]).any()


def test_neighbouring_classes_have_different_colours():
    colors = np.array([class_color(k) for k in range(20)])
    distances = np.abs(colors[:, None] - colors[None]).max(axis=-1) + np.eye(20)
    assert distances.min() > 0.1
