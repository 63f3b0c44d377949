"""Reading of an output folder, with the reason for each missing input."""

import json
import os

import pytest
import torch
import yaml
from detectron2.config import get_cfg

from fcos_d2 import add_fcos_config
from fcos_d2.data import DataError, load_records
from fcos_d2.files import dataset_slug
from fcos_d2.visualization.report.gather import (
    Best,
    changed_settings,
    describe_checkpoints,
    gather_run,
    load_source,
)


def change_json(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_config(run, section, **values):
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings[section].update(values)
    (run / "config.yaml").write_text(yaml.safe_dump(settings))


def test_a_whole_run(run, shapes_source):
    found = gather_run(run)
    assert found.folder.name == "run" and set(found.problems) == {"commands"}
    assert found.cfg.MODEL.RESNETS.DEPTH == 18
    assert found.history[-1]["bbox/AP"] == 41.0
    (evaluation,) = found.evaluations
    assert evaluation.dataset == shapes_source and evaluation.problems == {}
    assert len(evaluation.records) == evaluation.tables["num_images"] == 12
    assert len(evaluation.predictions) == evaluation.tables["num_predictions"]


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        gather_run(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=f"{tmp_path} is not the output folder of a run"):
        gather_run(tmp_path)


def test_test_sets_without_a_config(run, results, shapes_source, caplog):
    (run / "config.yaml").unlink()
    found = gather_run(run)
    assert found.problems["config"] == "config.yaml is missing."
    assert found.cfg is None and [x.dataset for x in found.evaluations] == [shapes_source]
    (results / "evaluation.json").write_text("{")
    assert gather_run(run).evaluations == [] and "evaluation.json is not JSON" in caplog.text


@pytest.mark.parametrize("text", ["a: [", "text", "\xff", "{victim}"])
def test_a_config_that_is_not_yaml(run, tmp_path, text):
    """The last one is YAML's tag for a call of Python, which a full loader would execute."""
    victim = tmp_path / "made by yaml"
    text = text.format(victim=f"A: !!python/object/apply:os.mkdir ['{victim}']")
    (run / "config.yaml").write_text(text, encoding="latin-1")
    found = gather_run(run)
    assert found.cfg is None and found.settings == {} and "config" in found.problems
    assert not victim.exists()


def test_a_config_of_another_version(run):
    change_config(run, "MODEL", GONE=1)
    found = gather_run(run)
    assert found.cfg is None and "MODEL.GONE" in found.problems["cfg"]
    assert ["MODEL.GONE", "1", "–"] in changed_settings(found.settings).to_numpy().tolist()


@pytest.mark.parametrize(
    ("file", "content", "field", "message"),
    [
        ("evaluation.json", None, "tables", "evaluation.json is missing"),
        ("evaluation.json", "{", "tables", "is not JSON"),
        ("coco_instances_results.json", None, "predictions", "results.json is missing"),
        (
            "coco_instances_results.json",
            '[{"image_id": "x", "category_id": 0, "bbox": [0, 0, 1, 1], "score": 1}]',
            "predictions",
            "image 'x'",
        ),
    ],
)
def test_missing_and_broken_results(run, results, file, content, field, message):
    (results / file).unlink() if content is None else (results / file).write_text(content)
    (evaluation,) = gather_run(run).evaluations
    assert message in evaluation.problems[field] and str(run) not in evaluation.problems[field]
    assert evaluation.predictions is None
    assert (evaluation.tables is None) == (field == "tables")


@pytest.mark.parametrize("skip", [True, False])
def test_bad_boxes_are_skipped_only_if_the_run_did(run, make_voc, skip):
    """Whatever the report accepts, a training without SKIP_BAD_BOXES refuses."""
    voc = make_voc()
    voc.add("a", [("cat", "1 1 20 20"), ("cat", "30 1 20 20")])
    change_config(run, "DATASETS", TEST=[voc.source()], SKIP_BAD_BOXES=skip)
    (evaluation,) = gather_run(run).evaluations
    assert ("records" in evaluation.problems) != skip
    assert skip is False or len(evaluation.records[0]["annotations"]) == 1
    with pytest.raises(DataError, match="a.xml"):
        load_records(voc.source())


def test_data_that_is_gone_or_has_other_classes(run, results):
    names = json.loads((results / "evaluation.json").read_text())["class_names"]
    change_json(results / "evaluation.json", class_names=["disc", *names[1:]])
    (evaluation,) = gather_run(run).evaluations
    assert evaluation.records is None and "disc" in evaluation.problems["records"]

    gone = "voc:no/such/folder:test"
    change_config(run, "DATASETS", TEST=[gone])
    os.rename(results, results.parent / dataset_slug(gone))
    (evaluation,) = gather_run(run).evaluations
    assert evaluation.tables is not None and "no/such/folder" in evaluation.problems["records"]


def test_proposal_recall(run, results):
    (results / "evaluation.json").unlink()
    (results / "box_proposals.pkl").write_bytes(b"")
    line = {"iteration": 401, "box_proposals/AR@100": 55.5, "other/box_proposals/AR@100": 1.0}
    with open(run / "metrics.json", "a") as file:
        file.write(json.dumps(line) + "\n")
    (evaluation,) = gather_run(run).evaluations
    assert evaluation.proposal_recall == {"AR@100": 55.5}
    assert "proposal network" in evaluation.problems["tables"]


def test_settings_that_differ_from_the_defaults():
    cfg = get_cfg()
    add_fcos_config(cfg)
    assert changed_settings(yaml.safe_load(cfg.dump())).empty
    cfg.SOLVER.STEPS = (7,)
    cfg.MODEL.FPN.NORM = "GN"
    assert changed_settings(yaml.safe_load(cfg.dump())).to_numpy().tolist() == [
        ["MODEL.FPN.NORM", "'GN'", "''"],
        ["SOLVER.STEPS", "[7]", "[30000]"],
    ]


def test_checkpoints(run):
    """The digest is that of ``printf weights | sha256sum``."""
    (run / "model_0000009.pth").write_bytes(b"not listed")
    digest = "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c"
    assert describe_checkpoints(run) == [
        {"file": "model_final.pth", "size": "0.0 MiB", "sha256": digest}
    ]


def test_best_evaluation(run, caplog):
    path = run / "model_best.pth"
    assert gather_run(run).best is None and not caplog.text
    best = {"metric": "bbox/AP", "value": 43.5}
    torch.save({"model": {}, "iteration": 199, "best": best}, path)
    assert gather_run(run).best == Best("bbox/AP", 43.5, 199) and not caplog.text
    for content in (b"broken", None):
        path.write_bytes(content) if content else torch.save({"model": {}}, path)
        caplog.clear()
        assert gather_run(run).best is None
        assert "model_best.pth does not name the best evaluation" in caplog.text


def test_commands(run):
    found = gather_run(run)
    assert found.commands == [] and found.problems["commands"] == "commands.json is missing."
    command = {"command": "python train_net.py", "environment": {}}
    (run / "commands.json").write_text(json.dumps([command]))
    assert gather_run(run).commands == [command]
    for content in ("{", '[{"command": "x"}]', "3"):
        (run / "commands.json").write_text(content)
        found = gather_run(run)
        assert found.commands == [] and "is not a list of commands" in found.problems["commands"]


def test_the_first_available_data_set(shapes_source):
    gone = "voc:no/such/folder:train"
    name, records, names = load_source([gone, shapes_source], False)
    assert name == shapes_source and len(records) == 12 and len(names) == 6
    with pytest.raises(ValueError, match="No data set is available.*no/such/folder"):
        load_source([gone], False)
