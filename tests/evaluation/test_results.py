"""Result files, as the evaluator and Detectron2 write them."""

import json
import logging

import pytest

from fcos_d2.evaluation.results import read_metrics, read_predictions, read_tables, write_results


def write_metrics(folder, *lines):
    """Dicts as JSON lines, strings as they are."""
    path = folder / "metrics.json"
    path.write_text("".join(x if isinstance(x, str) else json.dumps(x) + "\n" for x in lines))
    return path


def training(iteration, loss=1.0):
    return {"iteration": iteration, "total_loss": loss}


def test_lines_of_one_iteration_are_merged(tmp_path):
    lines = training(19, 3.0), {"iteration": 19, "bbox/AP": 5.0}, training(39, 2.0)
    history = read_metrics(write_metrics(tmp_path, *lines))
    assert history == [{**training(19, 3.0), "bbox/AP": 5.0}, training(39, 2.0)]


def test_a_resumed_run_replaces_what_it_repeats(tmp_path):
    """Stopped after 59, resumed from 30: 39 and 59 of the first attempt are gone."""
    first, second = [{**training(i, 9.0), "old": 1} for i in (19, 39, 59)], [39, 49]
    history = read_metrics(write_metrics(tmp_path, *first, *map(training, second)))
    assert history == [first[0], training(39), training(49)]


def test_incomplete_lines_are_skipped(tmp_path, caplog):
    path = write_metrics(
        tmp_path,
        training(19),
        "\n",
        '{"iteration": 25, "to' + json.dumps(training(39)) + "\n",  # killed, then resumed
        training(59),
        '{"iteration": 79, "total_l',
    )
    with caplog.at_level(logging.WARNING, logger="fcos_d2"):
        assert [line["iteration"] for line in read_metrics(path)] == [19, 59]
    assert [f"line {n} is" in caplog.text for n in (2, 3, 5)] == [False, True, True]


TABLES = {"dataset": "pets", "class_names": ["cat", "dog"], "category_ids": [3, 8]}


def test_category_ids_of_the_file_become_class_ids(tmp_path):
    predictions = [{"image_id": 1, "category_id": k, "bbox": [0, 0, 1, 1]} for k in (1, 0)]
    write_results(tmp_path, predictions, TABLES)
    written = json.loads((tmp_path / "coco_instances_results.json").read_text())
    assert [item["category_id"] for item in written] == [8, 3]
    assert read_predictions(tmp_path) == predictions
    assert read_tables(tmp_path) == TABLES


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("evaluation.json", "{", "evaluation.json is not JSON.*evaluate again"),
        ("evaluation.json", "3", "evaluation.json has no 'dataset'"),
        ("evaluation.json", '{"dataset": "pets"}', "evaluation.json has no 'class_names'"),
        ("coco_instances_results.json", "[1]", "is not a list of predictions"),
        ("coco_instances_results.json", '[{"category_id": 7}]', "category id 7, which is not in"),
    ],
)
def test_files_in_another_format(tmp_path, file, content, message):
    write_results(tmp_path, [], TABLES)
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_predictions(tmp_path)
