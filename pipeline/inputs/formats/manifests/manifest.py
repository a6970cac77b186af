"""Read manifests of images: one record is one row, whose image is at the address that the record names.

A record that cannot be read becomes a row with a status, so that every other row keeps its number. A manifest
is divided into shards by its bytes when it is listed. It is one file of the input like a tar: if it changes,
its rows are no longer those of the run. The images that it names are not watched.
"""

from __future__ import annotations

from dataclasses import replace
from typing import IO, Any

import pyarrow as pa

from blip2_actor import Status
from pipeline.errors import InputError
from pipeline.inputs.formats.addresses import folder_of, key_of, refusal, resolve
from pipeline.inputs.formats.manifests.records import Kind, kind_of, names, records, values
from pipeline.inputs.formats.rows import escape_name
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
    shard, row, rows, reason = work.shard, 0, None, None
    start, stop = shard.span or (0, None)
    num_rows = None if shard.num_rows is None else shard.limit_rows(shard.num_rows)
    try:
        with open_file(shard, BUFFER_BYTES) as file:
            rows = _Rows(shard, *_columns(file, shard, options), options)
            for end, record in records(file, rows.kind, max(start, rows.start)):
                if row == num_rows or (stop is not None and end > stop):
                    break
                if work.wants(row):
                    rows.add(row, record)
                    if rows.is_full:
                        yield rows.take()
                row += 1
    except _ERRORS as error:
        reason = str(error)
    if rows is not None and rows.rows:
        yield rows.take()
    if reason is None and num_rows is not None and row < num_rows:
        reason = f"{row} records were found where {num_rows} were listed"
    return ShardReport(
        shard=shard.name,
        num_rows=row,
        complete=reason is None,
        reason=reason and f"{shard.uri}: {reason}",
        note=None if rows is None else rows.note,
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
            return _columns(file, shard, options)[0]
    except _ERRORS as error:
        raise InputError(f"{shard.uri}: {error}") from error


def _columns(file: IO[bytes], shard: Shard, options: ReadOptions) -> tuple[Columns, Kind, list[str], int]:
    """Return the columns that are read, and the kind, the columns and the first record of a manifest."""
    kind = kind_of(shard.files[0])
    header, start = names(file, kind)
    schema = pa.schema([(name, pa.string()) for name in header])
    return Columns.find(schema, replace(options, fetch=True, image_encoding="auto")), kind, header, start


class _Rows:
    """Collects the rows of a table."""

    def __init__(
        self, shard: Shard, columns: Columns, kind: Kind, header: list[str], start: int, options: ReadOptions
    ) -> None:
        self._shard = shard
        self._columns = columns
        self._header = header
        self._options = options
        self._folder = folder_of(shard.root, shard.files[0])
        self.kind = kind
        self.start = start
        """Position of the first record of the manifest."""
        fields = replace(options, fetch=True, image_encoding="auto").columns
        self._schema = pa.schema(fields | dict.fromkeys([*options.texts, *options.kept], pa.string()))
        self.rows: list[dict[str, Any]] = []
        self._num_bytes = 0

    @property
    def note(self) -> str | None:
        """What a person must know of kept columns that the manifest lacks."""
        return self._columns.note("manifest")

    @property
    def is_full(self) -> bool:
        too_many = len(self.rows) >= self._options.table_rows
        return too_many or self._num_bytes >= self._options.table_bytes

    def add(self, number: int, record: bytes) -> None:
        row: dict[str, Any] = {"shard": self._shard.name, "row": number}
        try:
            found = self._row(values(record, self.kind, self._header))
            for value in found.values():
                (value or "").encode()  # JSON may have half of a surrogate pair, which is no text.
            row |= found
        except ValueError as error:
            line = record.strip()[:200].decode(errors="surrogateescape")
            row |= {"key": escape_name(line), "status": Status.UNREADABLE}
            row["error"] = f"the record cannot be read: {error}"
        self.rows.append(row)
        self._num_bytes += len(record)

    def _row(self, found: dict[str, str | None]) -> dict[str, Any]:
        columns = self._columns
        address = (found[columns.image.name] or "").strip()
        key = None if columns.key is None else found[columns.key.name]
        row: dict[str, Any] = {"key": key or escape_name(key_of(address))}
        row |= {name: found[field.name] or None for name, field in columns.texts.items()}
        row |= {name: found[field.name] for name, field in columns.kept.items()}
        if not address:
            return row | {"status": Status.MISSING_IMAGE, "error": "the record names no image"}
        if reason := refusal(address, self._folder):
            return row | {"status": Status.REFUSED, "error": escape_name(reason)}
        return row | {ADDRESS: resolve(address, self._folder)}

    def take(self) -> pa.Table:
        """Return the rows as a table, and start the next one."""
        table = pa.Table.from_pylist(self.rows, self._schema)
        self.rows, self._num_bytes = [], 0
        return table
