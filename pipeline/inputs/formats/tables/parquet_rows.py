"""Turn record batches of a Parquet file into a reader's tables."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from blip2_actor import Status
from pipeline.inputs.formats.tables.column_chunks import column_chunks
from pipeline.inputs.formats.tables.columns import Columns, is_bytes, is_text
from pipeline.inputs.formats.tables.image_cells import Images, read_cells
from pipeline.inputs.formats.tables.image_lists import KEYS, MEMBERS, unfold
from pipeline.inputs.formats.tables.texts import escape_texts, not_utf8
from pipeline.inputs.reader import ADDRESS, MEMBER, ReadOptions
from pipeline.schema import plain_type, to_plain


class ParquetRows:
    """Makes tables of the rows of one shard. All tables have the same schema.

    Args:
        shard: name of the shard.
        offset: number of the row in the file that is row 0 of the shard, if each has one image.
        columns: the columns that are read.
        options: the limits of a table and of an image.
        folder: URI of the folder that relative paths in cells are relative to.
    """

    def __init__(
        self, shard: str, offset: int, columns: Columns, options: ReadOptions, folder: str = ""
    ) -> None:
        self.columns = columns
        self.options = options
        self._shard = shard
        self._offset = offset
        self._folder = folder
        texts = dict.fromkeys(columns.texts, pa.string())
        kept = {
            name: plain_type(columns.kept[name].type) if name in columns.kept else pa.null()
            for name in options.kept
        }
        self._schema = pa.schema(options.columns | texts | kept)

    def unfold(self, batch: pa.RecordBatch, first_row: int) -> pa.RecordBatch:
        """Return a batch of the file with a row for each image; `first_row` is its first row in the file."""
        return unfold(batch, self.columns.image.name, first_row) if self.columns.has_lists else batch

    def read(self, batch: pa.RecordBatch, row: int) -> pa.Table:
        """Make a table of an unfolded batch whose first row is number `row` of the shard.

        A row whose prompt or scored text is not UTF-8 is refused. In a key, such bytes are escaped.
        """
        images = read_cells(batch.column(self.columns.image.name), self.options, self._folder)
        has_lists = self.columns.has_lists
        keys = batch.column(KEYS) if has_lists else self._row_numbers(row, len(batch))
        members = batch.column(MEMBERS) if has_lists else pa.nulls(len(batch), pa.string())
        if self.columns.key is not None:
            keys = pc.coalesce(escape_texts(batch.column(self.columns.key.name))[0], keys)
        others = []
        for field in self.columns.texts.values():
            texts, rows = escape_texts(batch.column(field.name))
            for not_text in rows:
                images.refuse(not_text, not_utf8(f"the text in {field.name!r}", texts[not_text].as_py()))
            others.append(texts)
        for name in self.options.kept:
            field = self.columns.kept.get(name)
            if field is None:
                others.append(pa.nulls(len(batch)))
            else:
                others.append(to_plain(batch.column(field.name)))
        return self._table(row, keys, images, members, others)

    def unreadable(self, row: int, num_rows: int, reason: str) -> pa.Table:
        """Make a table of rows that exist according to the file's footer but cannot be read."""
        others = [pa.nulls(num_rows, field.type) for field in list(self._schema)[len(self.options.columns) :]]
        failures = dict.fromkeys(range(num_rows), (Status.UNREADABLE, reason))
        images = Images(pa.nulls(num_rows, pa.binary()), {}, failures)
        keys = self._row_numbers(row, num_rows)
        return self._table(row, keys, images, pa.nulls(num_rows, pa.string()), others)

    def batch_rows(self, metadata: pq.FileMetaData, group: int) -> int:
        """Return how many rows fill a table, by the average size of a row in a row group.

        Raises:
            OSError: the footer is damaged.
        """
        chunks = column_chunks(metadata, group, self.columns.names)
        num_bytes = sum(chunk.total_uncompressed_size for chunk in chunks.values())
        row_bytes = max(1, num_bytes // max(1, metadata.row_group(group).num_rows))
        return max(1, min(self.options.table_rows, self.options.table_bytes // row_bytes))

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
        self, row: int, keys: pa.Array, images: Images, members: pa.Array, others: list[pa.Array]
    ) -> pa.Table:
        num_rows = len(keys)
        encoded, statuses, errors, addresses = images.columns()
        first = {
            "key": keys,
            "shard": pa.repeat(pa.scalar(self._shard), num_rows),
            "row": pa.array(range(row, row + num_rows), pa.int64()),
            "image": encoded,
            "status": statuses,
            "error": errors,
            MEMBER: members,
            ADDRESS: addresses,
        }
        columns = [first[name] for name in self.options.columns]
        return pa.Table.from_arrays([*columns, *others], schema=self._schema)

    def _row_numbers(self, row: int, num_rows: int) -> pa.Array:
        """Return the numbers of rows in the file as strings; they are the keys if there is no key column."""
        start = self._offset + row
        return pa.array(range(start, start + num_rows), pa.int64()).cast(pa.string())


def _row_bytes(batch: pa.RecordBatch) -> np.ndarray:
    """Return the bytes of each row in columns of bytes and text, including those in structs: int64[N]."""
    num_bytes = np.zeros(len(batch), np.int64)
    columns = list(batch.columns)
    while columns:
        column = columns.pop()
        if pa.types.is_struct(column.type):
            columns += column.flatten()
        elif is_bytes(column.type) or is_text(column.type):
            num_bytes += pc.fill_null(pc.binary_length(to_plain(column)), 0).to_numpy(zero_copy_only=False)
    return num_bytes
