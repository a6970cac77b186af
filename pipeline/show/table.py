"""Rows of an output as text: a table for a terminal, or lines with tabs for another program.

Captions, keys and errors come from untrusted data: control codes are shown as escapes.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from blip2_actor import Status
from pipeline.report.rows import is_own_column, one_line, short_value

PAGE_ROWS = 200
"""Rows that are laid out at once; the first page decides the widths of all."""
NARROW = 60
"""Narrower terminals have no room for columns of status and logprob."""
MIN_WIDTH = 20
LOGPROB_WIDTH = 8
GAP = 2

Row = Mapping[str, Any]


def pages(rows: Iterable[Row], width: int) -> Iterator[str]:
    """Yield the pages of a table with the columns key, status, logprob and result.

    The result is the caption, and below it the columns that the user has named. Of a failed row it is the
    error. Without rows, a sentence says so.

    Args:
        width: columns of the terminal. No line is longer, unless there are fewer than 20.
    """
    rows = iter(rows)
    page = list(islice(rows, PAGE_ROWS))
    if not page:
        yield "no row matches\n"
        return
    widths, has_header = _widths(page, max(width, MIN_WIDTH)), True
    while page:
        yield _page(page, widths, has_header)
        page, has_header = list(islice(rows, PAGE_ROWS)), False


def tabbed_lines(rows: Iterable[Row]) -> Iterator[str]:
    """Yield a line of column names, then a line per row, with tabs between the values."""
    rows = iter(rows)
    first = next(rows, None)
    if first is None:
        return
    names = ["key", "status", *(name for name in ("logprob", "caption") if name in first), "error"]
    names += filter(is_own_column, first)
    yield "\t".join(map(one_line, names))
    for row in chain([first], rows):
        yield "\t".join("" if row.get(name) is None else short_value(row[name], None) for name in names)


def _widths(rows: list[Row], width: int) -> dict[str, int]:
    """Return the width of each column, for a table of the whole width."""

    def longest(name: str) -> int:
        return max(len(name), *(cell_len(one_line(row[name])) for row in rows))

    widths = {"key": min(longest("key"), width // 3)}
    if width >= NARROW:
        widths["status"] = longest("status")
        if any(row.get("logprob") is not None for row in rows):
            widths["logprob"] = LOGPROB_WIDTH
    widths["result"] = width - sum(widths.values()) - GAP * len(widths)
    return widths


def _page(rows: list[Row], widths: Mapping[str, int], has_header: bool) -> str:
    table = Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False, show_header=has_header)
    for name, width in widths.items():
        table.add_column(name, width=width, overflow="fold")
    for row in rows:
        table.add_row(*(Text(_cell(row, name, "status" in widths)) for name in widths))
    file = io.StringIO()
    total = sum(widths.values()) + GAP * (len(widths) - 1)
    Console(file=file, width=total, color_system=None, legacy_windows=False).print(table)
    return "".join(f"{line.rstrip()}\n" for line in file.getvalue().splitlines())


def _cell(row: Row, name: str, has_status: bool) -> str:
    if name == "logprob":
        return "" if row.get(name) is None else f"{row[name]:.3f}"
    if name != "result":
        return one_line(row[name])
    if row["status"] != Status.OK.value:
        error = one_line(row["error"] or "")
        return error if has_status else f"{row['status']}: {error}"
    lines = [one_line(row["caption"])] if row.get("caption") is not None else []
    lines += [f"{one_line(column)}: {short_value(row[column])}" for column in filter(is_own_column, row)]
    return "\n".join(lines)
