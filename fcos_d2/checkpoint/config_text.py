"""Configs that are Python text, read without running it."""

import ast
import contextlib
from collections.abc import Collection
from typing import Any


def read_sections(text: str, names: Collection[str]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Read the dictionaries that the text assigns to ``names``.

    Args:
        text: of a config; of anything else, and of a config that is continued in other files
            (``_base_``), nothing is read.
        names: what to look for.

    Returns:
        the dictionaries that are there by their names, tuples in them as lists; and the dotted
        names of what in them can't be read and is left out.
    """
    sections: dict[str, Any] = {}
    unread: list[str] = []
    try:
        statements = [x for x in ast.parse(text).body if isinstance(x, ast.Assign)]
        values = {ast.unparse(x.targets[0]): x.value for x in statements}
        for name in () if "_base_" in values else names:
            if name in values:
                with contextlib.suppress(TypeError, ValueError):
                    sections[name] = _value(values[name], name, unread)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}, []
    return {name: value for name, value in sections.items() if isinstance(value, dict)}, unread


def _value(node: ast.expr, name: str, unread: list[str]) -> Any:
    """What an expression of constants and containers says, ``dict(key=...)`` included.

    A ``type`` may be a class instead of its name. ``name`` is the dotted one of what has the value.

    Raises:
        TypeError: it is no such expression.
        ValueError: the same.
    """
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(item, name, unread) for item in node.elts]
    if isinstance(node, ast.Name | ast.Attribute) and name.endswith(".type"):
        return ast.unparse(node)
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "dict" and not node.args:
        entries = [(word.arg, word.value) for word in node.keywords]
    elif isinstance(node, ast.Dict):
        keys = (None if key is None else ast.literal_eval(key) for key in node.keys)
        entries = list(zip(keys, node.values, strict=True))
    else:
        return ast.literal_eval(node)
    value = {}
    for key, item in entries:
        entry = f"{name}.{'**' if key is None else key}"  # dict(**others)
        try:
            value[key] = _value(item, entry, unread)
        except (TypeError, ValueError):
            unread.append(entry)
    return value
