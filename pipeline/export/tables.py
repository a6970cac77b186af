"""Shards as CSV, as JSON lines, and as lines of text. Every row of the shard is there, in its order."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import IO

import pyarrow as pa
import pyarrow.csv as pacsv

from pipeline.report.rows import FinishedRows, json_line, plain_value, rows_in, tables_of


def write_csv(file: IO[bytes], found: FinishedRows, shard: str) -> int:
    """Write a header and the rows. Lists are JSON, bytes hexadecimal; null is empty, empty text is quoted."""
    num_rows, writer = 0, None
    for table in _tables(found, shard):
        flat = pa.table({name: _flat(table[name]) for name in table.schema.names})
        if writer is None:
            writer = pacsv.CSVWriter(file, flat.schema)
        writer.write_table(flat)
        num_rows += len(flat)
    if writer is not None:
        writer.close()
    return num_rows


def write_jsonl(file: IO[bytes], found: FinishedRows, shard: str) -> int:
    """Write one JSON object per row, with every column."""
    num_rows = 0
    for row in rows_in(tables_of(found.folder, shard)):
        file.write(json_line(row).encode() + b"\n")
        num_rows += 1
    return num_rows


def write_txt(file: IO[bytes], found: FinishedRows, shard: str) -> int:
    """Write one caption per line; the line of a row without a caption is empty."""
    num_rows = 0
    for row in rows_in(tables_of(found.folder, shard, ["caption"])):
        file.write(" ".join((row["caption"] or "").splitlines()).encode() + b"\n")
        num_rows += 1
    return num_rows


def _tables(found: FinishedRows, shard: str) -> Iterator[pa.Table]:
    """Yield the row groups of a shard; of a shard without rows one empty table, for the header."""
    is_empty = True
    for table in tables_of(found.folder, shard):
        is_empty = False
        yield table
    if is_empty:
        yield found.schema().empty_table()


def _flat(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a column as CSV can hold it."""
    types = pa.types
    is_any_bytes = types.is_binary, types.is_large_binary, types.is_fixed_size_binary
    if not (types.is_nested(column.type) or any(fits(column.type) for fits in is_any_bytes)):
        return column
    values = (plain_value(value) for value in column.to_pylist())
    texts = [value if value is None or isinstance(value, str) else json.dumps(value) for value in values]
    return pa.chunked_array([pa.array(texts, pa.string())])
