"""The files that are drawn from an output folder, whatever is missing in it."""

import json
import re

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image

from fcos_d2.engine.commands import record_command
from fcos_d2.evaluation import ModelInfo, analysis
from fcos_d2.files import dataset_slug
from fcos_d2.visualization.report import page, sections, write_report

FILES = ["training_curves.png", "detections.png", "report.html"]


@pytest.fixture(autouse=True)
def _one_overlay(monkeypatch):
    monkeypatch.setattr(sections, "_NUM_OVERLAYS", 1)  # more would only take time


@pytest.fixture
def report(monkeypatch):
    """Return the text of report.html, without drawing the other files."""
    monkeypatch.setattr(page, "plot_training_curves", lambda *args: None)
    monkeypatch.setattr(page, "draw_detection_grid", lambda *args: None)
    return lambda run: write_report(run)[-1].read_text()


def missing(html):
    """Reasons of the sections without content."""
    return re.findall(r'<p class="missing">(.*)</p>', html)


def titles(html):
    return re.findall(r"<h[23]>(.*)</h[23]>", html.partition("<main>")[2])


def notes(html):
    """The lines below the main metrics, without the first, which has numbers of images."""
    return re.findall(r'<p class="note">(.*)</p>', html)[1:]


def change_tables(results, **values):
    path = results / "evaluation.json"
    tables = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: x for key, x in tables.items() if x is not None}))


@pytest.mark.slow
def test_a_whole_run(run):
    assert write_report(str(run)) == [run / file for file in FILES]
    for file in FILES[:2]:
        with Image.open(run / file) as image:
            assert image.format == "PNG"
    assert missing((run / "report.html").read_text()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "content", "message", "lost"),
    [
        ("metrics.json", None, "metrics.json is missing", 0),
        ("coco_instances_results.json", None, "coco_instances_results.json is missing", 1),
        ("evaluation.json", "{", "evaluation.json is not JSON", 1),
    ],
)
def test_a_missing_input_costs_one_picture(run, caplog, file, content, message, lost):
    (path,) = run.rglob(file)
    path.unlink() if content is None else path.write_text(content)
    written = [run / x for x in FILES if x != FILES[lost]]
    assert write_report(run) == written
    assert f"{FILES[lost]} not written: " in caplog.text and message in caplog.text
    assert any(message in reason for reason in missing(written[-1].read_text()))


def test_training_only(report, run):
    """Without config.yaml and inference/ there are curves."""
    (run / "config.yaml").unlink()
    (run / "inference").rename(run / "elsewhere")
    html = report(run)
    assert titles(html) == [
        "Summary",
        "Training",
        "Assignment of locations",
        "Commands and configuration",
    ]
    assert len(missing(html)) == 2  # no evaluation; no config for the assignment
    assert html.count("<img ") == 4


@pytest.mark.slow
def test_two_test_sets(make_run, run, shapes_source, hostile_source):
    make_run(run, [shapes_source, hostile_source])
    second = run / f"detections_{dataset_slug(hostile_source)}.png"
    assert write_report(run) == [*(run / x for x in FILES[:2]), second, run / FILES[2]]


def test_category_ids_of_a_coco_file(make_run, make_coco, run):
    """The results have the category ids 3 and 8, drawn as classes 0 and 1."""
    image = {"id": 4, "file_name": "a1.jpg", "width": 80, "height": 60}
    item = {"id": 1, "image_id": 4, "category_id": 8, "bbox": [10, 10, 40, 30], "area": 1200}
    categories = [{"id": 3, "name": "cat"}, {"id": 8, "name": "dog"}]
    make_run(run, [make_coco([image], [{**item, "iscrowd": 0}], categories)])
    results = (run / "inference").rglob("coco_instances_results.json")
    assert any('"category_id": 8' in path.read_text() for path in results)
    assert write_report(run) == [run / file for file in FILES]
    html = (run / "report.html").read_text()
    assert missing(html) == [] and '<th scope="row">dog</th>' in html


def test_a_proposal_network(report, run, results):
    (results / "evaluation.json").unlink()
    (results / "box_proposals.pkl").write_bytes(b"")
    with open(run / "metrics.json", "a") as file:
        file.write(json.dumps({"iteration": 401, "box_proposals/AR@100": 55.5}) + "\n")
    html = report(run)
    assert "<dt>AR@100</dt><dd>55.5</dd>" in html
    assert any("proposal network" in text for text in missing(html))


def test_no_predictions(report, make_run, hostile_source, tmp_path):
    run = make_run(tmp_path / "run", [hostile_source])
    (path,) = run.rglob("coco_instances_results.json")
    path.write_text("[]")
    html = report(run)
    assert missing(html) == [] and "AP lost by type of error" in titles(html)


def test_a_report_that_fails_keeps_the_old_one(tmp_path, monkeypatch, caplog):
    (tmp_path / "report.html").write_text("old")
    (tmp_path / "metrics.json").touch()
    monkeypatch.setattr(page, "_templates", lambda: 1 / 0)
    assert write_report(tmp_path) == []
    assert (tmp_path / "report.html").read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "metrics.json"}
    assert "report.html not written: Unexpected error: ZeroDivisionError" in caplog.text


def test_an_unexpected_error_costs_one_section(report, run, results, caplog):
    """A custom backbone, and tables in another format."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["MODEL"]["BACKBONE"]["NAME"] = "my_own"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    change_tables(results, bbox=None, per_class=None)
    html = report(run)
    summary, tables, curves, assignment = missing(html)
    assert summary == tables == "Unexpected error: KeyError: &#39;bbox&#39;"
    assert curves == "Unexpected error: KeyError: &#39;per_class&#39;"
    assert assignment.startswith("Unexpected error: KeyError:") and "my_own" in assignment
    assert {"Training", "Confusion of classes"} <= set(titles(html))
    assert "Unexpected error:\nTraceback" in caplog.text


def test_an_analysis_that_fails(report, run, monkeypatch):
    monkeypatch.setattr(analysis, "precision_recall", lambda *inputs: [] + 1)
    html = report(run)
    (text,) = missing(html)
    assert text.startswith("No analysis: Unexpected error: TypeError: can only concatenate")
    assert {"Summary", "AP", "Training", "Assignment of locations"} <= set(titles(html))


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (ModelInfo(iteration=399), "model in training, iteration 399"),
        (
            ModelInfo(iteration=399, ema=True),
            "model in training, iteration 399, averaged weights (EMA)",
        ),
        (ModelInfo("a<b.pth", tta=True), "a&lt;b.pth, test-time augmentation"),
        (
            ModelInfo("a.pth", 9, optimize="bfloat16+compile"),
            "a.pth, iteration 9, TEST.OPTIMIZE bfloat16+compile",
        ),
    ],
)
def test_the_evaluated_model_is_named(report, make_run, hostile_source, tmp_path, model, text):
    html = report(make_run(tmp_path / "run", [hostile_source], model_info=model))
    assert notes(html) == [f"Evaluated: {text}."]


@pytest.mark.parametrize("shown", [None, 199, 399])
def test_the_best_evaluation_is_named(report, make_run, hostile_source, tmp_path, shown):
    """Unless it is shown; the iteration of an evaluation without a model is unknown."""
    model = ModelInfo(iteration=shown) if shown else None
    run = make_run(tmp_path / "run", [hostile_source], model_info=model)
    best = {"metric": "bbox/AP", "value": 43.54}
    torch.save({"model": {}, "iteration": 199, "best": best}, run / "model_best.pth")
    start = "Results of iteration 399; the" if shown else "The"
    text = f"{start} best evaluation, bbox/AP 43.5 at iteration 199, is in model_best.pth."
    assert notes(report(run))[1 if shown else 0 :] == ([] if shown == 199 else [text])


def test_curves_with_results_of_other_weights(report, make_run, hostile_source, tmp_path):
    run = make_run(tmp_path / "run", [hostile_source])
    commands = (["train_net.py"], ["train_net.py", "--eval-only", "MODEL.WEIGHTS", "a.pth"])
    for command, eval_only in zip(commands, (False, True), strict=True):
        record_command(run, command, "cpu")
        assert ("last command was --eval-only" in report(run)) == eval_only


@pytest.mark.parametrize("format_", ["all", "bars", "words"])
def test_tables(format_):
    macro = page._templates().get_template("sections.html.j2").module.table
    frame = pd.DataFrame(
        {
            "class": ["a", "<b>", "c"],
            "AP": [51.26, np.nan, 100.0],
            "count": [3, 0, 1],
            "key": ["A.B_c <d> 1.5", "y", "z"],
        }
    )
    if format_ == "words":
        html = str(macro(frame[["class", "key"]], "Caption"))
        assert '<figure class="table words">' in html
        assert "<td>A.<wbr>B_<wbr>c &lt;d&gt; 1.5</td>" in html
        return
    html = str(macro(frame, "Caption", digits=2, bar="AP" if format_ == "bars" else None))
    assert re.findall(r'<th scope="col"( class="number")?>(\w+)</th>', html) == [
        ("", "class"),
        (' class="number"', "AP"),
        (' class="number"', "count"),
        ("", "key"),
    ]
    assert '<th scope="row">&lt;b&gt;</th>' in html
    assert re.findall(r'<td class="number"[^>]*>(.*?)</td>', html) == [
        *("51.26", "3"),
        *("–", "0"),
        *("100.00", "1"),
    ]
    bars = ["51.3", "100.0"] if format_ == "bars" else []
    assert re.findall(r'style="--bar: ([\d.]+)%"', html) == bars
    assert "<tbody>\n  </tbody>" in str(macro(frame.iloc[:0], "Caption"))
