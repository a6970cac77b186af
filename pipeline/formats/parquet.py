"""Parquet tables with a column of encoded images.

A row group that is damaged costs its own rows only. They are given as unreadable, so that every
other row keeps its number.
"""

from __future__ import annotations

import io
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from blip2_actor import Status
from pipeline.formats.columns import Columns
from pipeline.inputs.reader import READ_COLUMNS, ReadOptions, ShardReport, ShardWork, Tables
from pipeline.inputs.shards import InputError, Shard
from pipeline.storage.filesystems import join, open_filesystem
from pipeline.storage.retrying_file import open_input

BUFFER_BYTES = 4 << 20
"""A column is read in such pieces, never a row group at once: one may be larger than memory."""

_DAMAGE = (OSError, pa.ArrowException)


def read(work: ShardWork, options: ReadOptions) -> Tables:
    """Give the rows asked for; a row group of which nothing is asked for is not touched."""
    shard, num_rows, reasons = work.shard, 0, []
    try:
        with _open(shard) as file:
            sizes = _group_sizes(file.metadata)
            first, stop = shard.row_groups or (0, len(sizes))
            rows = _Rows(shard.name, sum(sizes[:first]), Columns.find(file.schema_arrow, options), options)
            num_rows = shard.rows_of(sum(sizes[first:stop]))
            start = 0
            for group in range(first, stop):
                wanted = list(work.overlaps(start, min(start + sizes[group], num_rows)))
                if wanted:
                    reason = yield from _read_group(file, group, start, wanted, rows)
                    reasons += [reason] if reason else []
                start += sizes[group]
    except (InputError, *_DAMAGE) as error:
        reasons.append(str(error))
    return ShardReport(
        shard=shard.name,
        num_rows=num_rows,
        complete=not reasons,
        reason=f"{shard.uri}: {'; '.join(reasons[:3])}" if reasons else None,
    )


def split(shard: Shard, most_bytes: int) -> list[Shard]:
    """Cut a larger file into ranges of row groups of about so many bytes; a damaged one stays whole."""
    if shard.size_bytes is not None and shard.size_bytes <= most_bytes:
        return [shard]
    try:
        with _open(shard) as file:
            metadata = file.metadata
    except _DAMAGE:
        return [shard]  # Reading it will say what is wrong.
    ranges: list[tuple[int, int, int]] = []  # first and last group, bytes
    for group in range(metadata.num_row_groups):
        size_bytes = metadata.row_group(group).total_byte_size
        if ranges and ranges[-1][2] + size_bytes <= most_bytes:
            ranges[-1] = (ranges[-1][0], group + 1, ranges[-1][2] + size_bytes)
        else:
            ranges.append((group, group + 1, size_bytes))
    if len(ranges) < 2:
        return [replace(shard, num_rows=metadata.num_rows)]
    sizes, width = _group_sizes(metadata), len(str(metadata.num_rows - 1))
    parts = []
    for first, stop, size_bytes in ranges:
        start, num_rows = sum(sizes[:first]), sum(sizes[first:stop])
        name = f"{shard.name}~{start:0{width}}-{start + num_rows - 1:0{width}}"
        parts.append(
            replace(shard, name=name, row_groups=(first, stop), num_rows=num_rows, size_bytes=size_bytes)
        )
    return parts


def count_rows(shard: Shard) -> int:
    """Rows by the file's own account; none when it cannot be opened."""
    try:
        with _open(shard) as file:
            return file.metadata.num_rows
    except _DAMAGE:
        return 0


def schema_of(shard: Shard) -> pa.Schema:
    with _open(shard) as file:
        return file.schema_arrow


class _Rows:
    """Makes tables of a shard's rows; all have the same schema."""

    def __init__(self, shard: str, offset: int, columns: Columns, options: ReadOptions) -> None:
        self.columns = columns
        self.options = options
        self._shard = shard
        self._offset = offset
        """Row of the file that is row 0 of the shard."""
        texts = dict.fromkeys(columns.texts, pa.string())
        kept = {name: field.type for name, field in columns.kept.items()}
        self._schema = pa.schema(READ_COLUMNS | texts | kept)

    def of(self, batch: pa.RecordBatch, row: int) -> pa.Table:
        """A table of a batch whose first row is so-and-so-many of the shard."""
        images, statuses, errors = self._images(batch.column(self.columns.image.name))
        keys = self._row_numbers(row, len(batch))
        if self.columns.key is not None:
            keys = pc.coalesce(batch.column(self.columns.key.name).cast(pa.string()), keys)
        others = [batch.column(field.name).cast(pa.string()) for field in self.columns.texts.values()]
        others += [batch.column(field.name) for field in self.columns.kept.values()]
        return self._table(row, keys, images, statuses, errors, others)

    def unreadable(self, row: int, count: int, reason: str) -> pa.Table:
        """Rows that are there, by the file's own account, and cannot be read."""
        others = [pa.nulls(count, field.type) for field in list(self._schema)[len(READ_COLUMNS) :]]
        statuses, errors = [Status.UNREADABLE] * count, [reason] * count
        return self._table(
            row, self._row_numbers(row, count), pa.nulls(count, pa.binary()), statuses, errors, others
        )

    def _table(
        self,
        row: int,
        keys: pa.Array,
        images: pa.Array,
        statuses: Sequence[Status | None],
        errors: Sequence[str | None],
        others: list[pa.Array],
    ) -> pa.Table:
        count = len(keys)
        shards = pa.repeat(pa.scalar(self._shard), count)
        rows = pa.array(range(row, row + count), pa.int64())
        settled = [pa.array(statuses, pa.string()), pa.array(errors, pa.string())]
        return pa.Table.from_arrays([keys, shards, rows, images, *settled, *others], schema=self._schema)

    def _row_numbers(self, row: int, count: int) -> pa.Array:
        start = self._offset + row
        return pa.array(range(start, start + count), pa.int64()).cast(pa.string())

    def _images(self, cells: pa.Array) -> tuple[pa.Array, list[Status | None], list[str | None]]:
        paths = None
        if pa.types.is_struct(cells.type):
            names = {field.name for field in cells.type}
            paths = pc.struct_field(cells, "path") if "path" in names else None
            cells = pc.struct_field(cells, "bytes")
        images = cells.cast(pa.binary())
        lengths = pc.fill_null(pc.binary_length(images), 0)
        most = self.options.max_image_bytes
        good = pc.and_(pc.greater(lengths, 0), pc.less_equal(lengths, most))
        statuses: list[Status | None] = [None] * len(images)
        errors: list[str | None] = [None] * len(images)
        for at in pc.indices_nonzero(pc.invert(good)).to_pylist():
            statuses[at] = Status.MISSING_IMAGE
            path = None if paths is None else paths[at].as_py()
            if lengths[at].as_py() > most:
                statuses[at] = Status.TOO_LARGE
                errors[at] = f"the cell has {lengths[at]} bytes, more than {most}"
            elif path is not None and not images[at].is_valid:
                errors[at] = f"the cell has no bytes, only the path {path!r}; embed the images in the table"
            else:
                errors[at] = "the cell is null" if not images[at].is_valid else "the cell is empty"
        return pc.if_else(good, images, None), statuses, errors


def _read_group(
    file: pq.ParquetFile, group: int, start: int, wanted: list[tuple[int, int]], rows: _Rows
) -> Generator[pa.Table, None, str | None]:
    """Give the wanted rows of a group whose first row is `start`; return what was wrong with it."""
    at, last = start, wanted[-1][1]
    reason = None
    try:
        for batch in file.iter_batches(
            _rows_at_once(file.metadata.row_group(group), rows),
            [group],
            rows.columns.to_read,
            use_threads=False,
        ):
            for low, high in _within(wanted, at, at + len(batch)):
                yield rows.of(batch.slice(low - at, high - low), low)
            at += len(batch)
            if at >= last:
                return None
        reason = f"row group {group} ends early"
    except _DAMAGE as error:
        reason = f"row group {group} cannot be read: {error}"
    for low, high in _within(wanted, at, last):
        for row in range(low, high, rows.options.table_rows):
            yield rows.unreadable(row, min(rows.options.table_rows, high - row), reason)
    return reason


def _within(spans: list[tuple[int, int]], start: int, stop: int) -> Iterator[tuple[int, int]]:
    for low, high in spans:
        if max(low, start) < min(high, stop):
            yield max(low, start), min(high, stop)


def _rows_at_once(group: pq.RowGroupMetaData, rows: _Rows) -> int:
    """As many rows as fill a table, by the average of their row group."""
    names = set(rows.columns.to_read)
    chunks = (group.column(at) for at in range(group.num_columns))
    num_bytes = sum(c.total_uncompressed_size for c in chunks if c.path_in_schema.split(".")[0] in names)
    average = max(1, num_bytes // max(1, group.num_rows))
    return max(1, min(rows.options.table_rows, rows.options.table_bytes // average))


@contextmanager
def _open(shard: Shard) -> Iterator[pq.ParquetFile]:
    filesystem, root = open_filesystem(shard.root)
    with (
        open_input(filesystem, join(root, shard.files[0])) as source,
        pq.ParquetFile(
            # Arrow takes what one call of a Python file's `read` gives for all there is.
            source if isinstance(source, pa.NativeFile) else io.BufferedReader(source),
            buffer_size=BUFFER_BYTES,
            pre_buffer=False,
            page_checksum_verification=True,
        ) as file,
    ):
        yield file


def _group_sizes(metadata: pq.FileMetaData) -> list[int]:
    return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
