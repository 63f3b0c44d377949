"""Which commands a run's folder comes from, and on what they ran."""

import ast
import json
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from ...files import COMMANDS_FILE

_ARGUMENTS = re.compile(
    r"^\[(?P<date>[^\]]*)\] .*Command line arguments: Namespace\((?P<text>.*)\)$"
)
_RULE = re.compile(r"^-{3,} +-{3,}\s*$")  # over and under the table of versions


def read_commands(output_dir: str | os.PathLike) -> list[dict]:
    """The commands of a run's folder, the latest last.

    They are those of ``commands.json``. A folder without it has what Detectron2 wrote into
    ``log.txt``: then the command is put together from the parsed arguments, and ``from_log`` is
    True.

    Returns:
        Dicts with ``command`` (text) and ``environment`` (names to values); none where neither
        file is there.

    Raises:
        ValueError: ``commands.json`` is not a list of commands and environments.
    """
    path = Path(output_dir) / COMMANDS_FILE
    try:
        commands = json.loads(path.read_text(encoding="utf-8"))
        return [{"command": x["command"], "environment": x["environment"]} for x in commands]
    except FileNotFoundError:
        return _read_log(Path(output_dir) / "log.txt")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a list of commands ({error!r}): delete it") from error


def _read_log(path: Path) -> list[dict]:
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    commands: list[dict] = []
    environment: dict[str, str] = {}
    for number, line in enumerate(lines):
        if line.endswith("Environment info:"):
            environment = _versions(lines[number + 1 :])
        match = _ARGUMENTS.match(line)
        if match:
            environment = {"date": match["date"], **environment}
            command = f"train_net.py {_command_line(match['text'])}"
            commands.append({"command": command, "environment": environment, "from_log": True})
    return commands


def _versions(lines: Sequence[str]) -> dict[str, str]:
    """The table at the head of ``lines``, between its two rules; names and values are columns."""
    if not lines or not _RULE.match(lines[0]):
        return {}
    column = lines[0].rindex(" -") + 1
    versions: dict[str, str] = {}
    for line in lines[1:]:
        if _RULE.match(line):
            break
        # Behind an @ stands where the library is installed.
        versions[line[:column].strip()] = line[column:].partition(" @")[0].strip()
    return versions


def _command_line(namespace: str) -> str:
    """Options and overrides from the ``repr`` of the parsed arguments, without its defaults.

    The arguments as they are, where they can't be parsed.
    """
    try:
        call = ast.parse(f"f({namespace})", mode="eval").body
        values = {item.arg: ast.literal_eval(item.value) for item in call.keywords}
    except (SyntaxError, ValueError, AttributeError):
        return namespace
    words = []
    for name, value in values.items():
        option = "--" + name.replace("_", "-")
        if value is True:
            words.append(option)
        elif name == "config_file" or (name.startswith("num_") and value != 1):
            words += [option, str(value)]
    return _shell_text([*words, *map(str, values.get("opts") or ())])


def _shell_text(words: Sequence[str]) -> str:
    """Words as a shell takes them; those of a config's tuples, as "('a',)", stay readable."""
    plain = [
        f'"{word}"' if "'" in word and not set(word) & set('"$`\\!') else shlex.quote(word)
        for word in words
    ]
    return " ".join(plain)
