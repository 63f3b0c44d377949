"""commands.json: the command lines of a run and the environment of each."""

import json
import subprocess

import pytest
import torch

from fcos_d2.engine.commands import record_command


def read(folder):
    return json.loads((folder / "commands.json").read_text())


def test_commands_are_appended(tmp_path):
    record_command(tmp_path / "run", ["train_net.py", "SOLVER.MAX_ITER", "9"], "cpu")
    record_command(tmp_path / "run", ["train_net.py", "--eval-only", "OUTPUT_DIR", "a b"], "cpu")
    first, last = read(tmp_path / "run")
    assert first["command"] == "python train_net.py SOLVER.MAX_ITER 9"
    assert last["command"] == "python train_net.py --eval-only OUTPUT_DIR 'a b'"
    assert last["environment"]["torch"] == torch.__version__
    assert first["environment"]["date"] <= last["environment"]["date"]


@pytest.mark.parametrize("words", [["('a', 'b c')"], ["it's $HOME"], ["a\"'b"], ["", "x y", "z"]])
def test_a_shell_reads_the_same_words(tmp_path, words):
    record_command(tmp_path, words, "cpu")
    script = read(tmp_path)[0]["command"].replace("python", "printf '%s\\n'", 1)
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == words


@pytest.mark.parametrize("content", ["{", '[{"command": "x"}]', "3"])
def test_a_broken_file_is_replaced(tmp_path, content):
    (tmp_path / "commands.json").write_text(content)
    record_command(tmp_path, ["train_net.py"], "cpu")
    assert [item["command"] for item in read(tmp_path)] == ["python train_net.py"]
