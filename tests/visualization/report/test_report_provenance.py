"""Which command a run comes from, as it was recorded or as log.txt has it."""

import json
import subprocess

import pytest
import torch

from fcos_d2.engine.commands import record_command
from fcos_d2.visualization.report.provenance import read_commands

# As Detectron2's default_setup writes it.
_LOG = """\
[11/22 22:06:25] detectron2 INFO: Rank of current process: 0. World size: 1
[11/22 22:06:25] detectron2 INFO: Environment info:
---------------------  -------------------------------------------
sys.platform           linux
Python                 3.11.7 (main, May  9 2026) [GCC 12.2.0]
PyTorch                2.14.1+cu130 @/home/me/lib/torch
GPU 0                  NVIDIA H200 (arch=9.0)
---------------------  -------------------------------------------
PyTorch built with:
  - GCC 13.3

[11/22 22:06:26] detectron2 INFO: Command line arguments: Namespace({arguments})
[11/22 22:06:26] detectron2 INFO: Contents of args.config_file=configs/a.yaml:
"""
_ARGUMENTS = (
    "config_file='configs/a.yaml', resume=True, eval_only=False, num_gpus=2, num_machines=1, "
    "machine_rank=0, dist_url='tcp://127.0.0.1:49152', opts=['DATASETS.TEST', \"('a b',)\"]"
)


def test_commands_are_recorded_in_turn(tmp_path):
    record_command(tmp_path / "run", ["train_net.py", "SOLVER.MAX_ITER", "9"], "cpu")
    record_command(tmp_path / "run", ["train_net.py", "--eval-only", "OUTPUT_DIR", "a b"], "cpu")
    first, last = read_commands(tmp_path / "run")
    assert first["command"] == "python train_net.py SOLVER.MAX_ITER 9"
    assert last["command"] == "python train_net.py --eval-only OUTPUT_DIR 'a b'"
    assert last["environment"]["torch"] == torch.__version__
    assert first["environment"]["date"] <= last["environment"]["date"]


def test_without_a_record_the_log_tells(tmp_path):
    """Only options that are not the default are given; the 2 processes are."""
    (tmp_path / "log.txt").write_text(_LOG.format(arguments=_ARGUMENTS))
    (command,) = read_commands(tmp_path)
    expected = (
        "train_net.py --config-file configs/a.yaml --resume --num-gpus 2 DATASETS.TEST \"('a b',)\""
    )
    assert command["command"] == expected
    assert command["environment"] == {
        "date": "11/22 22:06:26",
        "sys.platform": "linux",
        "Python": "3.11.7 (main, May  9 2026) [GCC 12.2.0]",
        "PyTorch": "2.14.1+cu130",
        "GPU 0": "NVIDIA H200 (arch=9.0)",
    }


@pytest.mark.parametrize("words", [["('a', 'b c')"], ["it's $HOME"], ["a\"'b"], ["", "x y", "z"]])
def test_a_shell_reads_the_same_words(tmp_path, words):
    record_command(tmp_path, words, "cpu")
    (item,) = read_commands(tmp_path)
    script = item["command"].replace("python", "printf '%s\\n'", 1)
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == words


def test_the_latest_of_a_log_is_last(tmp_path):
    other = _ARGUMENTS.replace("resume=True", "resume=False")
    text = _LOG.format(arguments=other) + _LOG.format(arguments=_ARGUMENTS)
    (tmp_path / "log.txt").write_text(text)
    commands = [item["command"] for item in read_commands(tmp_path)]
    assert ["--resume" in command for command in commands] == [False, True]


def test_arguments_that_are_no_literals_stay_as_they_are(tmp_path):
    (tmp_path / "log.txt").write_text(_LOG.format(arguments="config_file=<object at 0x7f>"))
    assert read_commands(tmp_path)[0]["command"] == "train_net.py config_file=<object at 0x7f>"


def test_a_record_takes_the_place_of_the_log(tmp_path):
    (tmp_path / "log.txt").write_text(_LOG.format(arguments=_ARGUMENTS))
    record_command(tmp_path, ["train_net.py"], "cpu")
    assert [item["command"] for item in read_commands(tmp_path)] == ["python train_net.py"]


def test_nothing_and_nonsense(tmp_path):
    assert read_commands(tmp_path) == []
    path = tmp_path / "commands.json"
    for content in ("{", json.dumps([{"command": "x"}]), "3"):
        path.write_text(content)
        with pytest.raises(ValueError, match="commands.json is not a list of commands"):
            read_commands(tmp_path)
    record_command(tmp_path, ["train_net.py"], "cpu")
    assert len(read_commands(tmp_path)) == 1
