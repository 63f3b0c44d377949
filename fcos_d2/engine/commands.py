"""`record_command`: keep the command line and the environment of a run in its folder."""

import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from ..environment import describe_environment
from ..files import COMMANDS_FILE, write_json


def record_command(output_dir: str | os.PathLike, arguments: Sequence[str], device: str) -> None:
    """Add a command to ``commands.json`` of a run's folder, with the versions that it runs on.

    Args:
        output_dir: folder of the run, created if missing.
        arguments: the command as in ``sys.argv``.
        device: "cpu", or "cuda" for the GPU's name too.
    """
    path = Path(output_dir) / COMMANDS_FILE
    try:
        commands = [
            {"command": x["command"], "environment": x["environment"]}
            for x in json.loads(path.read_text(encoding="utf-8"))
        ]
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # none yet, or edited by hand
        commands = []
    environment = describe_environment(device.split(":")[0])
    del environment["load_average"]  # of one moment, and a run takes hours
    command = f"python {_shell_text(arguments)}"
    write_json(path, [*commands, {"command": command, "environment": environment}], indent=2)


def _shell_text(words: Sequence[str]) -> str:
    """Quote words for a shell; those of a config's tuples, as "('a',)", stay readable."""
    plain = [
        f'"{word}"' if "'" in word and not set(word) & set('"$`\\!') else shlex.quote(word)
        for word in words
    ]
    return " ".join(plain)
