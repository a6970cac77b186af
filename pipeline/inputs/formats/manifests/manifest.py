"""Read manifests of images: one record is one row, whose image is at the address that the record names.

A record that cannot be read becomes a row with a status, so that every other row keeps its number. A manifest
is divided into shards by its bytes when it is listed. Like a tar, it is one file of the input: if it changes,
its rows are no longer those of the run. Changes of the images that it names are not noticed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pyarrow as pa

from blip2_actor import Status
from pipeline.errors import InputError
from pipeline.inputs.formats.addresses import folder_of, key_of, refusal, resolve
from pipeline.inputs.formats.manifests.records import Kind, kind_of, names, records, values
from pipeline.inputs.formats.rows import TableBuilder, escape_name
from pipeline.inputs.formats.tables.columns import Columns
from pipeline.inputs.formats.tar import open_file
from pipeline.inputs.reader import ADDRESS, ReadOptions, ShardReport, ShardWork, Tables
from pipeline.inputs.shards import Shard

ROWS_PER_SHARD = 1000
"""About as many as a tar usually has."""
BUFFER_BYTES = 1 << 20

_ERRORS = (InputError, OSError, pa.ArrowException)


def read(work: ShardWork, options: ReadOptions) -> Tables:
    """Yield the rows asked for."""
    shard, row, reason, note = work.shard, 0, None, None
    table = TableBuilder(
        shard.name, _with_addresses(options), dict.fromkeys([*options.texts, *options.kept], pa.string())
    )
    start, stop = shard.span or (0, None)
    folder = folder_of(shard.root, shard.files[0])
    num_rows = None if shard.num_rows is None else shard.limit_rows(shard.num_rows)
    try:
        with open_file(shard, BUFFER_BYTES) as file:
            kind = kind_of(shard.files[0])
            header, first = names(file, kind)
            columns = _columns(header, options)
            note = columns.note("manifest")
            for end, record in records(file, kind, max(start, first)):
                if row == num_rows or (stop is not None and end > stop):
                    break
                if work.wants(row):
                    table.add(row, _row(record, kind, header, columns, folder))
                    if table.is_full:
                        yield table.take()
                row += 1
    except _ERRORS as error:
        reason = str(error)
    if len(table):
        yield table.take()
    if reason is None and num_rows is not None and row < num_rows:
        reason = f"{row} records were found where {num_rows} were listed"
    return ShardReport(
        shard=shard.name,
        num_rows=row,
        complete=reason is None,
        reason=reason and f"{shard.uri}: {reason}",
        note=note,
    )


def split(shard: Shard) -> list[Shard]:
    """Divide a manifest into shards of `ROWS_PER_SHARD` rows.

    A manifest that cannot be read stays one shard; reading it says what is wrong.
    """
    try:
        with open_file(shard, BUFFER_BYTES) as file:
            kind = kind_of(shard.files[0])
            start = names(file, kind)[1]
            spans: list[tuple[int, int]] = []
            num_rows = 0
            for end, _ in records(file, kind, start):
                if num_rows % ROWS_PER_SHARD == 0:
                    spans.append((spans[-1][1] if spans else start, end))
                spans[-1] = (spans[-1][0], end)
                num_rows += 1
    except _ERRORS:
        return [shard]
    if not spans:
        return [replace(shard, num_rows=0)]
    width = len(str(num_rows - 1))
    parts = []
    for first, span in zip(range(0, num_rows, ROWS_PER_SHARD), spans, strict=True):
        last = min(first + ROWS_PER_SHARD, num_rows) - 1
        name = f"{shard.name}~{first:0{width}}-{last:0{width}}"
        size_bytes = span[1] - span[0]
        parts.append(replace(shard, name=name, span=span, num_rows=last + 1 - first, size_bytes=size_bytes))
    return parts


def columns_of(shard: Shard, options: ReadOptions) -> Columns:
    """Return the columns of a manifest.

    Raises:
        InputError: it cannot be read, or does not have the columns that the options name.
    """
    try:
        with open_file(shard, BUFFER_BYTES) as file:
            return _columns(names(file, kind_of(shard.files[0]))[0], options)
    except _ERRORS as error:
        raise InputError(f"{shard.uri}: {error}") from error


def _columns(header: list[str], options: ReadOptions) -> Columns:
    return Columns.find(pa.schema([(name, pa.string()) for name in header]), _with_addresses(options))


def _with_addresses(options: ReadOptions) -> ReadOptions:
    return replace(options, fetch=True, image_encoding="auto")


def _row(record: bytes, kind: Kind, header: list[str], columns: Columns, folder: str) -> dict[str, Any]:
    """Return the columns of a record, or why it cannot be read."""
    try:
        row = _values(values(record, kind, header), columns, folder)
        for value in row.values():
            (value or "").encode()  # JSON may have half of a surrogate pair, which cannot be encoded.
        return row
    except ValueError as error:
        line = record.strip()[:200].decode(errors="surrogateescape")
        return {
            "key": escape_name(line),
            "status": Status.UNREADABLE,
            "error": f"the record cannot be read: {error}",
        }


def _values(found: dict[str, str | None], columns: Columns, folder: str) -> dict[str, Any]:
    address = (found[columns.image.name] or "").strip()
    key = None if columns.key is None else found[columns.key.name]
    row: dict[str, Any] = {"key": key or escape_name(key_of(address))}
    row |= {name: found[field.name] or None for name, field in columns.texts.items()}
    row |= {name: found[field.name] for name, field in columns.kept.items()}
    if not address:
        return row | {"status": Status.MISSING_IMAGE, "error": "the record names no image"}
    if reason := refusal(address, folder):
        return row | {"status": Status.REFUSED, "error": escape_name(reason)}
    return row | {ADDRESS: resolve(address, folder)}
