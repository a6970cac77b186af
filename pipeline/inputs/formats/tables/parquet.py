"""Read Parquet tables with a column of images: one row of the table, or one element of a list, is one row.

A damaged row group costs its own rows only. They are yielded as unreadable, so that every other row keeps
its number. A file whose footer cannot be read is a shard without rows, and its report says why. Only the
row groups with rows that are asked for are read, in small batches whose sizes depend on the file and the
options alone, so the same work gives the same tables.
"""

from __future__ import annotations

import io
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import InputError
from pipeline.inputs.formats.addresses import folder_of
from pipeline.inputs.formats.tables.columns import Columns
from pipeline.inputs.formats.tables.image_lists import group_sizes
from pipeline.inputs.formats.tables.parquet_rows import ParquetRows
from pipeline.inputs.reader import ReadOptions, ShardReport, ShardWork, Tables
from pipeline.inputs.shards import Shard
from pipeline.storage.filesystems import join
from pipeline.storage.retrying_file import open_below

BUFFER_BYTES = 4 << 20
"""A column is read in pieces of this size, never a whole row group: one may be larger than memory."""

_DAMAGE_ERRORS = (OSError, pa.ArrowException, UnicodeError)
"""`UnicodeError` comes from column names, and from texts in nested columns that only Python can convert."""


def read(work: ShardWork, options: ReadOptions) -> Tables:
    """Yield the rows asked for. A row group without such rows is not read."""
    shard, num_rows, reasons, note = work.shard, 0, [], None
    try:
        with _open(shard) as file:
            columns = Columns.find(file.schema_arrow, options)
            sizes = group_sizes(file.metadata, columns)
            first, stop = shard.row_groups or (0, len(sizes))
            if stop > len(sizes):
                raise InputError(f"it has {len(sizes)} row groups, fewer than the run has listed")
            note = columns.note("file")
            file_rows = list(accumulate(_table_sizes(file.metadata), initial=0))
            folder = folder_of(shard.root, shard.files[0])
            rows = ParquetRows(shard.name, sum(sizes[:first]), columns, options, folder)
            num_rows = shard.limit_rows(sum(sizes[first:stop]))
            start = 0
            for group in range(first, stop):
                if wanted := list(work.overlaps(start, min(start + sizes[group], num_rows))):
                    last = wanted[-1][1]
                    reason = yield from _read_group(file, group, start, last, file_rows[group], work, rows)
                    reasons += [reason] if reason else []
                start += sizes[group]
    except (InputError, *_DAMAGE_ERRORS) as error:
        reasons.append(str(error))
    return ShardReport(
        shard=shard.name,
        num_rows=num_rows,
        complete=not reasons,
        reason=f"{shard.uri}: {'; '.join(reasons[:3])}" if reasons else None,
        note=note,
    )


def split(shard: Shard, max_bytes: int, options: ReadOptions) -> list[Shard]:
    """Cut a file into ranges of row groups of at most `max_bytes`, or of one row group that is larger.

    A damaged file stays one shard; reading it will say what is wrong.

    Args:
        options: which column holds the images; each element of a list is a row.
    """
    if shard.size_bytes is not None and shard.size_bytes <= max_bytes:
        return [shard]
    try:
        with _open(shard) as file:
            metadata, sizes = file.metadata, _sizes(file, options)
    except _DAMAGE_ERRORS:
        return [shard]
    ranges: list[tuple[int, int, int]] = []  # first group, end of the range (excluded), bytes
    for group in range(metadata.num_row_groups):
        size_bytes = metadata.row_group(group).total_byte_size
        if ranges and ranges[-1][2] + size_bytes <= max_bytes:
            ranges[-1] = (ranges[-1][0], group + 1, ranges[-1][2] + size_bytes)
        else:
            ranges.append((group, group + 1, size_bytes))
    if len(ranges) < 2:
        return [replace(shard, num_rows=sum(sizes))]
    width = len(str(sum(sizes) - 1))
    parts = []
    for first, stop, size_bytes in ranges:
        start, num_rows = sum(sizes[:first]), sum(sizes[first:stop])
        name = f"{shard.name}~{start:0{width}}-{start + num_rows - 1:0{width}}"
        parts.append(
            replace(shard, name=name, row_groups=(first, stop), num_rows=num_rows, size_bytes=size_bytes)
        )
    return parts


def count_rows(shard: Shard, options: ReadOptions) -> int:
    """Read the number of rows from the footer of the file; 0 if it cannot be opened."""
    try:
        with _open(shard) as file:
            return sum(_sizes(file, options))
    except _DAMAGE_ERRORS:
        return 0


def first_cells(shard: Shard, column: str, max_rows: int) -> pa.Array:
    """Read the first cells of a column; fewer or none if the file is damaged."""
    try:
        with _open(shard) as file:
            batch = next(file.iter_batches(max_rows, columns=[column], use_threads=False))
            return batch.column(column)
    except (StopIteration, *_DAMAGE_ERRORS):
        return pa.nulls(0)


def schema_of(shard: Shard) -> pa.Schema:
    """Read the columns of a file from its footer.

    Raises:
        InputError: the file cannot be opened as a table.
    """
    try:
        with _open(shard) as file:
            return file.schema_arrow
    except _DAMAGE_ERRORS as error:
        path, reason = join(shard.root, shard.files[0]), str(error).rstrip(".")
        raise InputError(
            f"{path} cannot be opened as a Parquet table ({reason}); repair the file, or leave it out of "
            "the input"
        ) from error


def _read_group(
    file: pq.ParquetFile,
    group: int,
    position: int,
    last: int,
    file_row: int,
    work: ShardWork,
    rows: ParquetRows,
) -> Generator[pa.Table, None, str | None]:
    """Yield the wanted rows of a row group.

    Args:
        position: number of the group's first row in the shard.
        last: end of the last wanted row of the group in the shard.
        file_row: number of the group's first row in the table.

    Returns:
        What is wrong with the group, or None.
    """
    try:
        for batch in file.iter_batches(
            rows.batch_rows(file.metadata, group),
            [group],
            rows.columns.names,
            use_threads=False,
        ):
            num_read, batch = len(batch), rows.unfold(batch, file_row)
            file_row += num_read
            for low, high in work.overlaps(position, min(position + len(batch), last)):
                part = batch.slice(low - position, high - low)
                for first, stop in rows.cut(part):
                    yield rows.read(part.slice(first, stop - first), low + first)
            position += len(batch)
            if position >= last:
                return None
        reason = f"row group {group} ends early"
    except _DAMAGE_ERRORS as error:
        reason = f"row group {group} cannot be read: {error}"
    for low, high in work.overlaps(position, last):
        for row in range(low, high, rows.options.table_rows):
            yield rows.unreadable(row, min(rows.options.table_rows, high - row), reason)
    return reason


@contextmanager
def _open(shard: Shard) -> Iterator[pq.ParquetFile]:
    with (
        open_below(shard.root, shard.files[0]) as source,
        pq.ParquetFile(
            # Arrow takes a short `read` of a Python file for the end of the file.
            source if isinstance(source, pa.NativeFile) else io.BufferedReader(source),
            buffer_size=BUFFER_BYTES,
            pre_buffer=False,
            page_checksum_verification=True,
        ) as file,
    ):
        yield file


def _sizes(file: pq.ParquetFile, options: ReadOptions) -> list[int]:
    """Return the number of rows of each row group; table rows are counted if no column can be the image."""
    try:
        columns = Columns.find(file.schema_arrow, options)
    except InputError:
        return _table_sizes(file.metadata)
    return group_sizes(file.metadata, columns)


def _table_sizes(metadata: pq.FileMetaData) -> list[int]:
    return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
