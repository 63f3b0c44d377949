"""Names and files of results: a folder name for a dataset, and files that appear whole or not."""

import contextlib
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

COMMANDS_FILE = "commands.json"  # in the output folder of a run
_MAX_SLUG = 120  # file systems allow 255 bytes; prefixes and suffixes want room too


def dataset_slug(name: str) -> str:
    """A file name for a dataset: ``voc:a/VOC2007:train`` becomes ``voc_a_VOC2007_train``.

    Every character outside ``[A-Za-z0-9._-]`` becomes one underscore, and leading dots go, so that
    no result folder is hidden or climbs. A name with letters beyond ASCII, which would all be
    underscores, gets a hash in front; so does a very long one, of which the end is kept.

    Raises:
        ValueError: the name is empty or blank.
    """
    if not name.strip():
        raise ValueError("the name of a dataset is empty: it needs at least one character")
    slug = re.sub(r"[^A-Za-z0-9._-]", "_", name).lstrip(".") or "_"
    if len(slug) > _MAX_SLUG or not name.isascii():
        digest = hashlib.sha256(name.encode()).hexdigest()[:8]
        slug = f"{digest}_{slug[-(_MAX_SLUG - len(digest) - 1) :]}"
    return slug


@contextlib.contextmanager
def atomic_path(target: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary path beside ``target``; it replaces ``target`` when the block succeeds.

    Folders are made as needed. When the block fails, the temporary file goes and an older
    ``target`` stays as it was.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays last: some writers take the format from it.
    temporary = target.with_name(f".{os.getpid()}.{target.name}")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(target: str | os.PathLike, content: Any, indent: int | None = None) -> None:
    """Write ``content`` atomically as strictly valid JSON: nan and infinities become ``null``."""
    text = json.dumps(_without_nan(content), indent=indent, allow_nan=False)
    with atomic_path(target) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
