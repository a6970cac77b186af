"""Shards as CSV, as JSON lines, and as lines of text. Every row of the shard is there, in its order."""

from __future__ import annotations

import json
from typing import IO

import pyarrow as pa
import pyarrow.csv as pacsv

from pipeline.report.rows import json_line, plain_value, rows_in, schema_of, tables_of
from pipeline.storage.folder import Folder


def write_csv(file: IO[bytes], folder: Folder, shard: str) -> None:
    """Write a header and the rows. Lists are JSON, bytes hexadecimal; null is empty, empty text is quoted."""
    header = _flat(schema_of(folder, shard).empty_table())
    with pacsv.CSVWriter(file, header.schema) as writer:
        for table in tables_of(folder, shard):
            writer.write_table(_flat(table))


def write_jsonl(file: IO[bytes], folder: Folder, shard: str) -> None:
    """Write one JSON object per row, with every column."""
    for row in rows_in(tables_of(folder, shard)):
        file.write(json_line(row).encode() + b"\n")


def write_txt(file: IO[bytes], folder: Folder, shard: str) -> None:
    """Write one caption per line; the line of a row without a caption is empty."""
    for row in rows_in(tables_of(folder, shard, ["caption"])):
        file.write(" ".join((row["caption"] or "").splitlines()).encode() + b"\n")


def _flat(table: pa.Table) -> pa.Table:
    return pa.table({name: _flat_column(table[name]) for name in table.schema.names})


def _flat_column(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a column as CSV can hold it."""
    types = pa.types
    is_any_bytes = types.is_binary, types.is_large_binary, types.is_fixed_size_binary
    if not (types.is_nested(column.type) or any(fits(column.type) for fits in is_any_bytes)):
        return column
    values = (plain_value(value) for value in column.to_pylist())
    texts = [value if value is None or isinstance(value, str) else json.dumps(value) for value in values]
    return pa.chunked_array([pa.array(texts, pa.string())])
