"""Dictionaries in a config that is Python source, read without executing it."""

import ast
import contextlib
from collections.abc import Collection
from typing import Any


def read_sections(text: str, names: Collection[str]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Read the dictionaries that a config assigns to ``names``.

    Args:
        text: Python source. In other text, and in a config that inherits from other files
            (``_base_``), nothing is found.
        names: variables to read.

    Returns:
        The dictionaries by name, tuples as lists; and the dotted names of unreadable entries, which
        are skipped.
    """
    sections: dict[str, Any] = {}
    unread: list[str] = []
    try:
        statements = [x for x in ast.parse(text).body if isinstance(x, ast.Assign)]
        values = {ast.unparse(x.targets[0]): x.value for x in statements}
        for name in () if "_base_" in values else names:
            if name in values:
                with contextlib.suppress(TypeError, ValueError):
                    sections[name] = _evaluate(values[name], name, unread)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}, []
    return {name: value for name, value in sections.items() if isinstance(value, dict)}, unread


def _evaluate(node: ast.expr, name: str, unread: list[str]) -> Any:
    """Return the value of constants, containers and ``dict(key=...)``; a ``type`` may be a class.

    ``name`` is the dotted name of the value. TypeError or ValueError for other expressions.
    """
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_evaluate(item, name, unread) for item in node.elts]
    if isinstance(node, (ast.Name, ast.Attribute)) and name.endswith(".type"):
        return ast.unparse(node)
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "dict" and not node.args:
        entries: list[tuple[Any, ast.expr]] = [(x.arg, x.value) for x in node.keywords]
    elif isinstance(node, ast.Dict):
        keys = (None if key is None else ast.literal_eval(key) for key in node.keys)
        entries = list(zip(keys, node.values, strict=True))
    else:
        return ast.literal_eval(node)
    value = {}
    for key, item in entries:
        entry = f"{name}.{'**' if key is None else key}"  # None: dict(**others)
        try:
            value[key] = _evaluate(item, entry, unread)
        except (TypeError, ValueError):
            unread.append(entry)
    return value
