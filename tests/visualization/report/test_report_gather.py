"""What is read of a run's folder, and what is said where something is missing."""

import json
import os

import pytest
import torch
import yaml
from detectron2.config import get_cfg

from fcos_d2 import add_fcos_config
from fcos_d2.files import dataset_slug
from fcos_d2.visualization.report.gather import (
    Best,
    changed_settings,
    describe_checkpoints,
    gather_run,
    load_source,
)


@pytest.fixture
def run(make_run, shapes_source, tmp_path):
    return make_run(tmp_path / "run", [shapes_source])


def place_of(run, source):
    return run / "inference" / dataset_slug(source)


def test_a_whole_run(run, shapes_source):
    found = gather_run(run)
    assert found.name == "run" and found.problems == {}
    assert found.cfg.MODEL.RESNETS.DEPTH == 18
    assert found.history[-1]["bbox/AP"] == 41.0
    (results,) = found.results
    assert results.dataset == shapes_source and results.problems == {}
    assert len(results.records) == results.evaluation["num_images"] == 12
    assert len(results.predictions) == results.evaluation["num_predictions"]


def test_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        gather_run(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=f"{tmp_path} is no run"):
        gather_run(tmp_path)


def test_without_a_config_the_evaluations_tell_the_test_sets(run, shapes_source):
    (run / "config.yaml").unlink()
    found = gather_run(run)
    assert [results.dataset for results in found.results] == [shapes_source]
    assert "config.yaml can't be read" in found.problems["config"] and found.cfg is None


def test_a_config_runs_no_code(run, tmp_path):
    """YAML's tag for a call of Python, which a full loader would obey."""
    victim = tmp_path / "made by yaml"
    (run / "config.yaml").write_text(f"A: !!python/object/apply:os.mkdir ['{victim}']")
    assert "is not a config in YAML" in gather_run(run).problems["config"]
    assert not victim.exists()


def test_a_config_of_another_version(run):
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["MODEL"]["FCOS"]["GONE"] = 1
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    found = gather_run(run)
    assert found.cfg is None and "MODEL.FCOS.GONE" in found.problems["cfg"]
    assert ("MODEL.FCOS.GONE", "1", "–") in changed_settings(found.settings)


@pytest.mark.parametrize(
    ("file", "content", "field", "words"),
    [
        ("evaluation.json", None, "evaluation", "evaluation.json is missing"),
        ("evaluation.json", "{", "evaluation", "is not JSON"),
        ("evaluation.json", "{}", "evaluation", "class_names"),
        ("coco_instances_results.json", None, "predictions", "results.json is missing"),
        ("coco_instances_results.json", "[1]", "predictions", "another form"),
        (
            "coco_instances_results.json",
            '[{"image_id": "x", "category_id": 0, "bbox": [0, 0, 1, 1], "score": 1}]',
            "predictions",
            "image 'x'",
        ),
    ],
)
def test_a_file_that_is_missing_or_broken(run, shapes_source, file, content, field, words):
    path = place_of(run, shapes_source) / file
    path.unlink()
    if content is not None:
        path.write_text(content)
    (results,) = gather_run(run).results
    assert words in results.problems[field]
    assert results.predictions is None
    assert (results.evaluation is None) == (field == "evaluation")


def test_data_that_is_gone_or_has_other_classes(run, shapes_source):
    path = place_of(run, shapes_source) / "evaluation.json"
    evaluation = json.loads(path.read_text())
    evaluation["class_names"][0] = "disc"
    path.write_text(json.dumps(evaluation))
    (results,) = gather_run(run).results
    assert results.records is None and "disc" in results.problems["records"]

    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["DATASETS"]["TEST"] = ["voc:no/such/folder:test"]
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    os.rename(path.parent, place_of(run, "voc:no/such/folder:test"))
    (results,) = gather_run(run).results
    assert results.evaluation is not None and "no/such/folder" in results.problems["records"]


def test_proposals_have_their_recall_in_the_metrics(run, shapes_source):
    place = place_of(run, shapes_source)
    (place / "evaluation.json").unlink()
    (place / "box_proposals.pkl").write_bytes(b"")
    line = {"iteration": 401, "box_proposals/AR@100": 55.5, "other/box_proposals/AR@100": 1.0}
    with open(run / "metrics.json", "a") as file:
        file.write(json.dumps(line) + "\n")
    (results,) = gather_run(run).results
    assert results.proposals == {"AR@100": 55.5}


def test_settings_that_differ_from_the_defaults():
    cfg = get_cfg()
    add_fcos_config(cfg)
    assert changed_settings(yaml.safe_load(cfg.dump())) == []
    cfg.SOLVER.STEPS = (7,)
    cfg.MODEL.FPN.NORM = "GN"
    assert changed_settings(yaml.safe_load(cfg.dump())) == [
        ("MODEL.FPN.NORM", "'GN'", "''"),
        ("SOLVER.STEPS", "[7]", "[30000]"),
    ]


def test_checkpoints(run):
    """The digest of ``printf weights | sha256sum``."""
    (run / "model_0000009.pth").write_bytes(b"not of interest")
    assert describe_checkpoints(run) == [
        {
            "file": "model_final.pth",
            "size": "0.0 MiB",
            "sha256": "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c",
        }
    ]


def test_the_best_evaluation_is_what_its_checkpoint_says(run, caplog):
    path = run / "model_best.pth"
    assert gather_run(run).best is None and not caplog.text
    best = {"metric": "bbox/AP", "value": 43.5}
    torch.save({"model": {}, "iteration": 199, "best": best}, path)
    assert gather_run(run).best == Best("bbox/AP", 43.5, 199) and not caplog.text
    for content in (b"broken", None):
        path.write_bytes(content) if content else torch.save({"model": {}}, path)
        caplog.clear()
        assert gather_run(run).best is None
        assert "model_best.pth does not tell the best evaluation" in caplog.text


def test_commands(run):
    assert gather_run(run).commands == []
    command = {"command": "python train_net.py", "environment": {}}
    (run / "commands.json").write_text(json.dumps([command]))
    assert gather_run(run).commands == [command]
    (run / "commands.json").write_text("{")
    found = gather_run(run)
    assert found.commands == [] and "is not a list of commands" in found.problems["commands"]


def test_the_first_data_set_that_is_at_hand(shapes_source):
    name, records, names = load_source(["voc:no/such/folder:train", shapes_source])
    assert name == shapes_source and len(records) == 12 and len(names) == 6
    with pytest.raises(ValueError, match="no/such/folder"):
        load_source(["voc:no/such/folder:train"])
