"""The report as a whole: whatever is missing, there is a page that says so."""

import itertools
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from fcos_d2.engine.commands import record_command
from fcos_d2.evaluation import analysis
from fcos_d2.evaluation.evaluator import ModelInfo
from fcos_d2.files import dataset_slug
from fcos_d2.visualization.report import build, results, write_report
from fcos_d2.visualization.report.gather import Best, gather_run


@pytest.fixture(autouse=True)
def _fewer_pictures(monkeypatch):
    """The other overlays would take half the time of these tests and show nothing new."""
    monkeypatch.setattr(build, "_NUM_OVERLAYS", 1)


@pytest.fixture
def run(make_run, shapes_source, tmp_path):
    return make_run(tmp_path / "run", [shapes_source])


def missing(page):
    """What the sections without content say."""
    return re.findall(r'<p class="missing">(.*)</p>', page)


def titles(page):
    return re.findall(r"<h[23]>(.*)</h[23]>", page.partition("<main>")[2])


def test_what_is_missing_is_said(run, shapes_source, caplog):
    """Neither curves nor predictions: the tables of evaluation.json stay."""
    (run / "metrics.json").unlink()
    (run / "inference" / dataset_slug(shapes_source) / "coco_instances_results.json").unlink()
    page = write_report(run)[-1].read_text()
    first, second = missing(page)
    assert "metrics.json is missing" in first
    assert "coco_instances_results.json is missing" in second
    assert {"Summary", "AP", "Assignment of locations", "The run"} <= set(titles(page))
    assert "Confusion of classes" not in titles(page)
    assert "metrics.json is missing" in caplog.text


def test_training_alone(run):
    """Without config.yaml and inference/ there are curves."""
    (run / "config.yaml").unlink()
    (run / "inference").rename(run / "elsewhere")
    page = write_report(run)[-1].read_text()
    assert titles(page) == ["Summary", "Training", "Assignment of locations", "The run"]
    assert len(missing(page)) == 2  # no evaluation; no config for the assignment
    assert page.count("<img ") == 4


def test_a_proposal_network(run, shapes_source):
    place = run / "inference" / dataset_slug(shapes_source)
    (place / "evaluation.json").unlink()
    (place / "box_proposals.pkl").write_bytes(b"")
    with open(run / "metrics.json", "a") as file:
        file.write(json.dumps({"iteration": 401, "box_proposals/AR@100": 55.5}) + "\n")
    page = write_report(run)[-1].read_text()
    assert "<dt>AR@100</dt><dd>55.5</dd>" in page
    assert any("proposal network" in text for text in missing(page))


def test_no_predictions_at_all(make_run, hostile_source, tmp_path):
    run = make_run(tmp_path / "run", [hostile_source])
    place = run / "inference" / dataset_slug(hostile_source)
    (place / "coco_instances_results.json").write_text("[]")
    page = write_report(run)[-1].read_text()
    assert missing(page) == [] and "Where the AP is lost" in titles(page)


def test_a_report_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    (tmp_path / "report.html").write_text("old")
    (tmp_path / "metrics.json").touch()
    monkeypatch.setattr(build, "_template", lambda: 1 / 0)
    assert write_report(tmp_path) == []
    assert (tmp_path / "report.html").read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "metrics.json"}


def test_of_a_large_data_set_some_images_are_assigned(run, monkeypatch):
    monkeypatch.setattr(build, "_MAX_ASSIGNED", 5)
    first, second = (build._assignment(gather_run(run)) for _ in range(2))
    assert first == second
    assert "5 images, chosen at random, of the 12 of voc:" in first[0].text


def test_an_error_that_nobody_foresaw_costs_its_section_alone(run, shapes_source, caplog):
    """A backbone of the user's own, and tables of another form."""
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("build_resnet_fcos_fpn_backbone", "my_own"))
    path = run / "inference" / dataset_slug(shapes_source) / "evaluation.json"
    evaluation = json.loads(path.read_text())
    del evaluation["bbox"], evaluation["per_class"]
    path.write_text(json.dumps(evaluation))
    page = write_report(run)[-1].read_text()
    assert f"<p>{shapes_source}: could not be made: KeyError: &#39;bbox&#39;</p>" in page
    tables, curves, assignment = missing(page)
    assert tables == "could not be made: KeyError: &#39;bbox&#39;"
    assert curves == "could not be made: KeyError: &#39;per_class&#39;"
    assert assignment.startswith("could not be made: KeyError:") and "my_own" in assignment
    assert {"Training", "Confusion of classes", "The run"} <= set(titles(page))
    assert "Assignment of locations could not be made:\nTraceback" in caplog.text


def test_an_analysis_that_fails_costs_the_others_alone(run, monkeypatch):
    monkeypatch.setattr(analysis, "precision_recall", lambda *inputs: [] + 1)
    page = write_report(run)[-1].read_text()
    (text,) = missing(page)
    assert text.startswith("No analysis: could not be made: TypeError: can only concatenate")
    assert {"Summary", "AP", "Training", "Assignment of locations"} <= set(titles(page))


def test_an_image_that_has_changed_is_not_drawn(run, monkeypatch, caplog):
    """Of another size than its record says, which is no OSError."""
    monkeypatch.setattr(build, "_NUM_OVERLAYS", 2)
    found = gather_run(run)
    (results,) = found.results
    records = [dict(x) for x in results.records if x["annotations"]][:2]
    records[0]["file_name"] = str(run / "other.png")
    Image.new("RGB", (3, 3)).save(records[0]["file_name"])
    monkeypatch.setattr(build, "load_source", lambda names: ("x", records, results.class_names))
    shots = build._assignment(found)[-1].shots
    assert [shot.name for shot in shots] == [str(records[1]["image_id"])]
    assert "other.png (Mismatched image shape" in caplog.text


def notes(page):
    """The lines under the numbers, but for the one that counts images."""
    return re.findall(r'<p class="note">(.*)</p>', page)[1:]


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (None, None),
        (ModelInfo(iteration=399), "the model in training, iteration 399"),
        (
            ModelInfo(iteration=399, ema=True),
            "the model in training, iteration 399, averaged weights (EMA)",
        ),
        (ModelInfo("a<b.pth", tta=True), "a&lt;b.pth, test-time augmentation"),
        (
            ModelInfo("a.pth", 9, optimize="bfloat16+compile"),
            "a.pth, iteration 9, TEST.OPTIMIZE bfloat16+compile",
        ),
    ],
)
def test_what_was_evaluated_is_said(make_run, hostile_source, tmp_path, model, words):
    page = write_report(make_run(tmp_path / "run", [hostile_source], model=model))[-1].read_text()
    assert notes(page) == ([f"Evaluated: {words}."] if words else [])


def test_results_of_an_older_version_say_nothing_of_the_model(run, shapes_source):
    path = run / "inference" / dataset_slug(shapes_source) / "evaluation.json"
    evaluation = json.loads(path.read_text())
    del evaluation["model"]
    path.write_text(json.dumps(evaluation))
    page = write_report(run)[-1].read_text()
    assert missing(page) == notes(page) == []


def test_the_best_evaluation_is_named_where_another_is_shown(make_run, shapes_source, tmp_path):
    model = ModelInfo(iteration=399)
    found = gather_run(make_run(tmp_path / "run", [shapes_source], model=model))
    best = Best("bbox/AP", 43.54, 199)

    def notes_of(best, **model):
        evaluation = {**found.results[0].evaluation, "model": model}
        results_ = found.results[0]._replace(evaluation=evaluation)
        (tiles,) = build._summary(found._replace(results=[results_], best=best))
        return tiles.notes[2:] if model else tiles.notes[1:]

    shown = found.results[0].evaluation["model"]
    text = "best, bbox/AP 43.5 at iteration 199, is model_best.pth."
    assert notes_of(best, **shown) == [f"Results of iteration 399; the {text}"]
    assert notes_of(best, **{**shown, "iteration": None}) == [f"The {text}"]
    assert notes_of(best) == [f"The {text}"]
    assert notes_of(best._replace(iteration=399), **shown) == []
    assert notes_of(None, **shown) == []


def test_the_best_evaluation_is_on_the_page(run):
    best = {"metric": "bbox/AP", "value": 43.54}
    torch.save({"model": {}, "iteration": 199, "best": best}, run / "model_best.pth")
    assert notes(write_report(run)[-1].read_text()) == [
        "The best, bbox/AP 43.5 at iteration 199, is model_best.pth."
    ]


def test_curves_of_a_training_beside_results_of_other_weights(run):
    commands = (["train_net.py"], ["train_net.py", "--eval-only", "MODEL.WEIGHTS", "a.pth"])
    for command, other in zip(commands, (False, True), strict=True):
        record_command(run, command, "cpu")
        blocks = build._curves(gather_run(run))
        assert ("last command was --eval-only" in blocks[0].text) == other
        assert blocks[-1].kind == "figures"


def test_threshold_of_best_f1_over_all_classes(run):
    """Against F1 counted anew for each threshold among the scores."""
    (found,) = gather_run(run).results
    inputs = (found.records, found.predictions, found.class_names)
    objects = int((~analysis.ground_truth(found.records, found.class_names)["ignored"]).sum())

    def f1(threshold):
        kept = [item for item in found.predictions if item["score"] >= threshold]
        outcomes = analysis.match_detections(found.records, kept, found.class_names)["outcome"]
        right, wrong = (outcomes == "tp").sum(), (outcomes == "fp").sum()
        return 2 * right / (right + wrong + objects)

    best = max(np.unique([item["score"] for item in inputs[1]]), key=f1)
    assert results._operating_threshold(found) == pytest.approx(np.floor(100 * best) / 100)
    nothing = found._replace(predictions=[])
    assert results._operating_threshold(nothing) == 0


def test_largest_confusions():
    """Off the diagonal 5 of class 1's 10 objects, 2 of class 0's 4; zeros are no confusion."""
    matrix = np.array([[2, 2, 0], [5, 5, 0], [0, 0, 9]])
    frame = results._largest_confusions(matrix, np.array([4, 10, 9]), ["a", "b", "c"])
    assert list(frame.itertuples(name=None)) == [("b", "a", 5, 50.0), ("a", "b", 2, 50.0)]
    many = np.arange(400).reshape(20, 20)
    frame = results._largest_confusions(many, many.sum(1), list("abcdefghijklmnopqrst"))
    expected = sorted(
        (many[i, j] for i, j in itertools.product(range(20), repeat=2) if i != j), reverse=True
    )
    assert frame["objects"].tolist() == expected[:10]


def test_text_breaks_behind_marks_only_before_letters():
    assert str(build._breakable("A.B_c <d> 1.5")) == "A.<wbr>B_<wbr>c &lt;d&gt; 1.5"
