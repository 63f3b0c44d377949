"""Plots of the report, and the choice and encoding of its photographs."""

import base64
import io
import xml.etree.ElementTree as ET

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from fcos_d2.evaluation.analysis import Calibration, PrecisionRecall
from fcos_d2.visualization.report import figures
from fcos_d2.visualization.report.figures import jpeg
from fcos_d2.visualization.report.photos import choose_images

NAN = float("nan")


def curve(outcomes, num_ground_truth):
    """A curve from the outcomes of a class's predictions, by descending score."""
    precision = np.cumsum(outcomes) / np.arange(1, len(outcomes) + 1)
    recall = np.cumsum(outcomes) / max(num_ground_truth, 1)
    scores = np.linspace(0.9, 0.1, len(outcomes))
    best = (0.5, 0.9, precision[0], recall[0]) if num_ground_truth and len(outcomes) else [NAN] * 4
    return PrecisionRecall("a", num_ground_truth, precision, recall, scores, *best)


def opened(picture):
    """The SVG behind a picture, whose size in points is that of the picture in pixels."""
    head, _, data = picture.source.partition(",")
    assert head == "data:image/svg+xml;base64" and picture.alt
    root = ET.fromstring(base64.b64decode(data))
    assert float(root.get("width").removesuffix("pt")) * 96 / 72 == pytest.approx(
        picture.width, 0.01
    )
    return root


@pytest.mark.parametrize("num_classes", [1, 80])
def test_every_plot_is_svg(num_classes):
    rng = np.random.default_rng(0)
    names = [f"class <{k}>" for k in range(num_classes)]
    matrix = rng.poisson(1.0, (num_classes + 1, num_classes + 1))
    opened(figures.confusion(matrix, names))
    curves = [curve(rng.integers(0, 2, 30), 20), curve([], 3), curve([0, 0], 0)]
    opened(figures.mean_precision_recall(curves))
    assert "no objects" in figures.precision_recall(curves[2]).alt
    for item in curves:
        opened(figures.precision_recall(item))


@pytest.mark.parametrize("history", [[{"iteration": 19, "total_loss": 1.0}], None])
def test_curves_of_a_short_and_of_a_long_training(history):
    history = history or [
        {"iteration": i, "total_loss": 1.0, "loss_cls": 0.5, "lr": 0.1, "fcos/num_pos": 9}
        for i in range(0, 90000, 20)
    ]
    pictures = figures.training_curves(history)
    assert [title for title, _ in pictures] == [
        "Losses",
        "AP over iterations",
        "Learning rate",
        "Matching",
    ]
    for _, picture in pictures:
        opened(picture)


def test_plots_of_nothing():
    """No prediction in any bin, no error, no object, no class with objects."""
    bins = pd.DataFrame({"low": [0.0, 0.5], "high": [0.5, 1.0], "count": [0, 0]})
    bins = bins.assign(mean_score=NAN, precision=NAN)
    opened(figures.reliability(Calibration(bins, NAN)))
    opened(figures.errors(pd.DataFrame({"dAP": [0.0, NAN]}, index=["missed", "background"])))
    opened(figures.positives_per_object(pd.DataFrame({"size": [], "positives": []})))
    opened(figures.mean_precision_recall([]))
    opened(figures.confusion(np.zeros((2, 2), int), ["a"]))
    opened(figures.confusion(np.zeros((3, 3), int), ["5$ x_^$", "1$"]))


def test_errors_are_told_in_words_too():
    dap = pd.DataFrame({"dAP": [1.25, 0.0]}, index=["missed", "background"])
    assert figures.errors(dap).alt.endswith("missed 1.2, background 0.0.")


def test_objects_by_their_number_of_positives():
    """0, 1, 2 to 3, 4 to 7, 8 to 15: the bars' heights are the counts, small ones at the bottom."""
    objects = pd.DataFrame(
        {"size": ["small", "small", "large", "large", "medium"], "positives": [0, 3, 2, 8, 9]}
    )
    picture = figures.positives_per_object(objects)
    assert "1 of 5 have none" in picture.alt
    opened(picture)


def test_the_same_numbers_give_the_same_file():
    assert figures.precision_recall(curve([1, 0], 2)) == figures.precision_recall(curve([1, 0], 2))


@pytest.mark.parametrize("num_images", [*range(14), 200])
def test_best_typical_and_worst_images(num_images):
    """F1 rises with the id; from 150 on it is 1, and of those 160 and 170 have most objects."""
    ids = np.arange(num_images)
    ranking = pd.DataFrame({"image_id": ids, "f1": np.minimum(ids, 150) / 150})
    ranking["tp"] = 1 + np.isin(ids, [160, 170]) * ids
    chosen = choose_images(ranking)
    together = [i for ids in chosen.values() for i in ids]
    assert len(together) == len(set(together)) == min(num_images, 12)
    if 0 < num_images < 14:
        assert chosen["Best"][0] == num_images - 1
    if num_images == 200:
        assert chosen == {
            "Best": [170, 160, 150, 151],
            "Typical": [98, 99, 100, 101],
            "Worst": [0, 1, 2, 3],
        }
    assert chosen["Worst"] == [*range(len(chosen["Worst"]))]


def test_photographs_are_small_jpegs():
    """900 x 300 pixels become 480 x 160."""
    pixels = np.random.default_rng(0).integers(0, 256, (300, 900, 3), dtype=np.uint8)
    picture = jpeg(pixels, "noise")
    head, _, data = picture.source.partition(",")
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        assert image.format == "JPEG" and image.size == (480, 160)
    assert head == "data:image/jpeg;base64" and picture[1:] == ("noise", 480, 160)
    assert jpeg(pixels[:20, :30], "stamp")[2:] == (30, 20)
