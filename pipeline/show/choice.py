"""Choose rows of an output: by status, by a pattern, and the first by a column."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from blip2_actor import Status
from blip2_actor.flags import did_you_mean
from pipeline.inputs.formats.tables.columns import is_text
from pipeline.settings.report_settings import NOT_OK, ShowSettings

NOT_SEARCHED = ("shard", "status", "finish_reason")
"""Text columns in which a pattern finds nothing of interest: the same few values in all rows."""


def chosen(tables: Iterable[pa.Table], settings: ShowSettings) -> Iterator[pa.Table]:
    """Yield the rows that the settings ask for, `limit` at most, in the order asked for."""
    matching = (_filter(table, settings) for table in tables)
    if settings.sort is not None:
        yield _first_sorted(matching, settings.sort, settings.limit, settings.descending)
        return
    left = settings.limit or sys.maxsize
    for table in matching:
        yield table.slice(0, left)
        left -= len(table)
        if left <= 0:
            return


def check_choice(schema: pa.Schema, settings: ShowSettings) -> None:
    """Check the settings against the columns of the output.

    Raises:
        ValueError: the column to sort by does not exist or has no order, or the pattern is no pattern.
    """
    if settings.grep is not None:
        try:
            pc.match_substring_regex(pa.array([""]), settings.grep)
        except pa.ArrowInvalid as error:
            raise ValueError(
                f"grep must be a regular expression, got {settings.grep!r}: {error}; "
                "put a backslash before characters that stand for themselves"
            ) from None
    name = settings.sort
    if name is None:
        return
    if name not in schema.names:
        raise ValueError(
            f"sort must be one of the columns {', '.join(schema.names)}, "
            f"got {name!r}{did_you_mean(name, schema.names)}"
        )
    if pa.types.is_nested(schema.field(name).type):
        raise ValueError(f"sort must name a column of single values, got {name!r}, which holds lists")


def _filter(table: pa.Table, settings: ShowSettings) -> pa.Table:
    if settings.status:
        table = table.filter(pc.is_in(table["status"], pa.array(_statuses(settings.status))))
    if settings.grep is not None:
        table = table.filter(_matches(table, settings.grep))
    return table


def _statuses(names: Sequence[str]) -> list[str]:
    not_ok = {status.value for status in Status} - {Status.OK.value}
    return sorted(not_ok.union(names) if NOT_OK in names else names)


def _matches(table: pa.Table, pattern: str) -> pa.ChunkedArray:
    """Return for each row whether one of its texts matches."""
    found = pa.chunked_array([pa.repeat(False, len(table))])
    for field in table.schema:
        if is_text(field.type) and field.name not in NOT_SEARCHED:
            matches = pc.match_substring_regex(table[field.name], pattern)
            found = pc.or_(found, pc.fill_null(matches, False))
    return found


def _first_sorted(tables: Iterable[pa.Table], column: str, limit: int, descending: bool) -> pa.Table:
    """Return the first rows by a column, nulls last; equal rows keep their order.

    Only `limit` rows are kept between two tables.
    """
    first: pa.Table | None = None
    order = [("by", "descending" if descending else "ascending")]
    for table in tables:
        if column not in table.schema.names:
            continue
        rows = table if first is None else pa.concat_tables([first, table], promote_options="permissive")
        values = rows[column]
        if pa.types.is_float16(values.type):  # which Arrow does not sort
            values = values.cast(pa.float32())
        first = rows.take(pc.sort_indices(pa.table({"by": values}), order).slice(0, limit))
    return pa.table({}) if first is None else first
