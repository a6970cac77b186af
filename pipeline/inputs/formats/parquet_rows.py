"""Turn record batches of a Parquet file into a reader's tables.

A cell without usable bytes becomes a row with a status and an error; it does not affect other rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from blip2_actor import Status
from pipeline.inputs.formats.columns import Columns, is_bytes, is_text
from pipeline.inputs.reader import MEMBER, ReadOptions
from pipeline.schema import plain_type, to_plain


class ParquetRows:
    """Makes tables of the rows of one shard. All tables have the same schema.

    Args:
        shard: name of the shard.
        offset: number of the row in the file that is row 0 of the shard.
        columns: the columns that are read.
        options: the limits of a table and of an image.
    """

    def __init__(self, shard: str, offset: int, columns: Columns, options: ReadOptions) -> None:
        self.columns = columns
        self.options = options
        self._shard = shard
        self._offset = offset
        texts = dict.fromkeys(columns.texts, pa.string())
        kept = {
            name: plain_type(columns.kept[name].type) if name in columns.kept else pa.null()
            for name in options.kept
        }
        self._schema = pa.schema(options.columns | texts | kept)

    def read(self, batch: pa.RecordBatch, row: int) -> pa.Table:
        """Make a table of a batch whose first row is number `row` of the shard."""
        images, statuses, errors = self._images(batch.column(self.columns.image.name))
        keys = self._row_numbers(row, len(batch))
        if self.columns.key is not None:
            keys = pc.coalesce(batch.column(self.columns.key.name).cast(pa.string()), keys)
        others = [batch.column(field.name).cast(pa.string()) for field in self.columns.texts.values()]
        for name in self.options.kept:
            field = self.columns.kept.get(name)
            if field is None:
                others.append(pa.nulls(len(batch)))
            else:
                others.append(to_plain(batch.column(field.name)))
        return self._table(row, keys, images, statuses, errors, others)

    def unreadable(self, row: int, num_rows: int, reason: str) -> pa.Table:
        """Make a table of rows that exist according to the file's footer but cannot be read."""
        others = [pa.nulls(num_rows, field.type) for field in list(self._schema)[len(self.options.columns) :]]
        return self._table(
            row,
            self._row_numbers(row, num_rows),
            pa.nulls(num_rows, pa.binary()),
            [Status.UNREADABLE] * num_rows,
            [reason] * num_rows,
            others,
        )

    def batch_rows(self, group: pq.RowGroupMetaData) -> int:
        """Return how many rows fill a table, by the average size of a row in the row group."""
        chunks = (group.column(index) for index in range(group.num_columns))
        num_bytes = sum(c.total_uncompressed_size for c in chunks if self._is_read(c.path_in_schema))
        row_bytes = max(1, num_bytes // max(1, group.num_rows))
        return max(1, min(self.options.table_rows, self.options.table_bytes // row_bytes))

    def _is_read(self, path: str) -> bool:
        """Return whether a path of the file's schema lies in a column that is read; names may have dots."""
        return any(path == name or path.startswith(f"{name}.") for name in self.columns.names)

    def cut(self, batch: pa.RecordBatch) -> Iterator[tuple[int, int]]:
        """Yield the parts of a batch that are tables: each ends as soon as it has `table_bytes` bytes.

        Rows may be far larger than the average row of their row group, by which batches are sized.
        """
        start = num_bytes = 0
        for row, row_bytes in enumerate(_row_bytes(batch).tolist()):
            num_bytes += row_bytes
            if num_bytes >= self.options.table_bytes or row + 1 == len(batch):
                yield start, row + 1
                start, num_bytes = row + 1, 0

    def _table(
        self,
        row: int,
        keys: pa.Array,
        images: pa.Array,
        statuses: Sequence[Status | None],
        errors: Sequence[str | None],
        others: list[pa.Array],
    ) -> pa.Table:
        num_rows = len(keys)
        shards = pa.repeat(pa.scalar(self._shard), num_rows)
        rows = pa.array(range(row, row + num_rows), pa.int64())
        rest = [pa.array(statuses, pa.string()), pa.array(errors, pa.string())]
        if MEMBER in self.options.columns:
            rest.append(pa.nulls(num_rows, pa.string()))
        return pa.Table.from_arrays([keys, shards, rows, images, *rest, *others], schema=self._schema)

    def _row_numbers(self, row: int, num_rows: int) -> pa.Array:
        """Return the numbers of rows in the file as strings; they are the keys if there is no key column."""
        start = self._offset + row
        return pa.array(range(start, start + num_rows), pa.int64()).cast(pa.string())

    def _images(self, cells: pa.Array) -> tuple[pa.Array, list[Status | None], list[str | None]]:
        """Return the images of a column, and a status and an error for each cell without a usable one."""
        paths = None
        if pa.types.is_struct(cells.type):
            names = {field.name for field in cells.type}
            paths = pc.struct_field(cells, "path") if "path" in names else None
            cells = pc.struct_field(cells, "bytes")
        images = cells.cast(pa.binary())
        lengths = pc.fill_null(pc.binary_length(images), 0)
        max_bytes = self.options.max_image_bytes
        usable = pc.and_(pc.greater(lengths, 0), pc.less_equal(lengths, max_bytes))
        statuses: list[Status | None] = [None] * len(images)
        errors: list[str | None] = [None] * len(images)
        for index in pc.indices_nonzero(pc.invert(usable)).to_pylist():
            statuses[index] = Status.MISSING_IMAGE
            is_null, path = not images[index].is_valid, None if paths is None else paths[index].as_py()
            if lengths[index].as_py() > max_bytes:
                statuses[index] = Status.TOO_LARGE
                errors[index] = f"the cell has {lengths[index]} bytes, more than {max_bytes}"
            elif path is not None and is_null:
                errors[index] = (
                    f"the cell has no bytes, only the path {path!r}; embed the images in the table"
                )
            else:
                errors[index] = "the cell is null" if is_null else "the cell is empty"
        return pc.if_else(usable, images, None), statuses, errors


def _row_bytes(batch: pa.RecordBatch) -> np.ndarray:
    """Return the bytes of each row in columns of bytes and text, also in structs: int64[N]."""
    num_bytes = np.zeros(len(batch), np.int64)
    columns = list(batch.columns)
    while columns:
        column = columns.pop()
        if pa.types.is_struct(column.type):
            columns += column.flatten()
        elif is_bytes(column.type) or is_text(column.type):
            num_bytes += pc.fill_null(pc.binary_length(to_plain(column)), 0).to_numpy(zero_copy_only=False)
    return num_bytes
