"""Values of the report's sections."""

import itertools

import numpy as np
import pytest
from PIL import Image

from fcos_d2.evaluation import analysis
from fcos_d2.visualization.report import sections
from fcos_d2.visualization.report.gather import gather_run


def test_threshold_of_the_best_f1(run):
    """Against F1 computed for each score as the threshold."""
    (evaluation,) = gather_run(run).evaluations
    records, predictions, names = sections.analysis_inputs(evaluation)
    objects = int((~analysis.ground_truth(records, names)["ignored"]).sum())

    def f1(threshold):
        kept = [item for item in predictions if item["score"] >= threshold]
        outcomes = analysis.match_detections(records, kept, names)["outcome"]
        right, wrong = (outcomes == "tp").sum(), (outcomes == "fp").sum()
        return 2 * right / (right + wrong + objects)

    best = max(np.unique([item["score"] for item in predictions]), key=f1)
    assert sections.best_threshold(evaluation) == pytest.approx(np.floor(100 * best) / 100)
    assert sections.best_threshold(evaluation._replace(predictions=[])) == 0


def test_largest_confusions():
    """Off the diagonal: 5 of the 10 objects of class b, 2 of the 4 of class a."""
    matrix = np.array([[2, 2, 0, 0], [5, 5, 0, 0], [0, 0, 9, 9], [1, 2, 3, 0]])
    frame = sections.largest_confusions(matrix, ["a", "b", "c"])
    assert frame.to_numpy().tolist() == [["b", "a", 5, 50.0], ["a", "b", 2, 50.0]]
    many = np.arange(441).reshape(21, 21)
    frame = sections.largest_confusions(many, list("abcdefghijklmnopqrst"))
    pairs = itertools.permutations(range(20), 2)
    assert frame["objects"].tolist() == sorted((many[pair] for pair in pairs), reverse=True)[:10]


def test_large_data_sets_are_sampled(run, monkeypatch):
    monkeypatch.setattr(sections, "_MAX_ASSIGNED", 5)
    monkeypatch.setattr(sections, "_NUM_OVERLAYS", 1)
    first, second = (sections.assignment(gather_run(run)) for _ in range(2))
    assert (first["num_assigned"], first["num_images"]) == (5, 12)
    assert first["photos"] == second["photos"] and first["picture"] == second["picture"]


def test_changed_images_are_not_drawn(run, monkeypatch, caplog):
    """An image of another size than in its record raises no OSError."""
    found = gather_run(run)
    records = [dict(x) for x in found.evaluations[0].records if x["annotations"]][:2]
    records[0]["file_name"] = str(run / "other.png")
    Image.new("RGB", (3, 3)).save(records[0]["file_name"])
    source = ("x", records, found.evaluations[0].class_names)
    monkeypatch.setattr(sections, "load_source", lambda *args: source)
    photos = sections.assignment(found)["photos"]
    assert [photo.name for photo in photos] == [str(records[1]["image_id"])]
    assert "other.png (Mismatched image shape" in caplog.text
