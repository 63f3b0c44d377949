"""Tables of numbers as the template shows them."""

import math
import numbers
from collections.abc import Mapping
from typing import Any, NamedTuple

import pandas as pd


class Cell(NamedTuple):
    """A cell: its text, and the length in percent of a bar behind it."""

    text: str
    bar: float | None = None


class Table(NamedTuple):
    """Columns, of numbers or of words, and rows; the first cell of a row is its name."""

    caption: str
    head: list[str]
    numeric: list[bool]
    rows: list[list[Cell]]


def table(
    frame: pd.DataFrame,
    caption: str,
    formats: Mapping[str, str] | None = None,
    bars: tuple[str, ...] = (),
) -> Table:
    """A data frame as a table, its index as the first column.

    Args:
        frame: its columns' and its index's names become the headers.
        caption: what the table shows.
        formats: format strings of columns. Without one, counts are written whole and other numbers
            with one digit. What is missing or nan becomes a dash.
        bars: columns in percent that get a bar.
    """
    formats = formats or {}
    rows = []
    for name, values in zip(frame.index, frame.itertuples(index=False, name=None), strict=True):
        cells = [Cell(str(name))]
        for column, value in zip(frame.columns, values, strict=True):
            bar = min(max(float(value), 0), 100) if column in bars and _known(value) else None
            cells.append(Cell(_text(value, formats.get(column)), bar))
        rows.append(cells)
    head = [str(frame.index.name or ""), *map(str, frame.columns)]
    numeric = [not any(isinstance(x, str) for x in frame[column]) for column in frame.columns]
    return Table(caption, head, [False, *numeric], rows)


def _known(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and math.isnan(value))


def _text(value: Any, form: str | None) -> str:
    if not _known(value):
        return "–"
    if form is None:
        form = "{}" if isinstance(value, (str, numbers.Integral)) else "{:.1f}"
    return form.format(value)
