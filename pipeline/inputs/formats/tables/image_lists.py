"""Lists of images: each element is a row of its own, next to the other columns of its row in the table.

A list that is null or empty is one row without an image. So the footer of a file tells the number of rows: it
counts the elements of each row group, and one for each list without any.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.inputs.formats.tables.column_chunks import column_chunks
from pipeline.inputs.formats.tables.columns import Columns
from pipeline.schema import to_plain

KEYS, MEMBERS = "_blip2_keys", "_blip2_members"
"""Columns that `unfold` adds: the number of the row in the table as text, and the place in its list."""


def group_sizes(metadata: pq.FileMetaData, columns: Columns) -> list[int]:
    """Return the number of rows that each row group has.

    Raises:
        OSError: the footer is damaged. Row groups with more rows than the file must not become rows.
    """
    groups = range(metadata.num_row_groups)
    sizes = [metadata.row_group(group).num_rows for group in groups]
    if sum(sizes) != metadata.num_rows or min(sizes, default=0) < 0:
        raise OSError(f"the footer is damaged: it has {metadata.num_rows} rows in row groups of {sum(sizes)}")
    if not columns.has_lists:
        return sizes
    schema = metadata.schema.to_arrow_schema()
    # By its place: names may have dots, so the path of a column `images.n` begins like that of `images`.
    before = list(schema)[: schema.get_field_index(columns.image.name)]
    place = sum(_num_leaves(field.type) for field in before)
    chunks = [column_chunks(metadata, group, [columns.image.name]).get(place) for group in groups]
    return [chunk.num_values if chunk else 0 for chunk in chunks]


def _num_leaves(type: pa.DataType) -> int:
    """Return how many columns of a Parquet file hold a column of a table."""
    if isinstance(type, pa.BaseExtensionType):
        return _num_leaves(type.storage_type)
    if pa.types.is_struct(type):
        return sum(_num_leaves(field.type) for field in type)
    if pa.types.is_map(type):
        return _num_leaves(type.key_type) + _num_leaves(type.item_type)
    return _num_leaves(type.value_type) if hasattr(type, "value_type") else 1


def unfold(batch: pa.RecordBatch, image: str, first_row: int) -> pa.RecordBatch:
    """Return a batch with a row for each element of the lists in its image column.

    Args:
        batch: rows of a table.
        image: name of the column of lists.
        first_row: number of the batch's first row in the table.
    """
    lists = to_plain(batch.column(image))
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    num_rows = np.maximum(lengths, 1)
    parents = np.repeat(np.arange(len(batch)), num_rows)
    has_image = np.repeat(lengths > 0, num_rows)
    places = np.arange(len(parents)) - np.repeat(np.cumsum(num_rows) - num_rows, num_rows)
    members = [f"{image}[{place}]" if held else None for place, held in zip(places, has_image, strict=True)]
    elements = lists.flatten().take(pa.array(np.cumsum(has_image) - 1, mask=~has_image))
    names = [name for name in batch.schema.names if name != image]
    others = {name: to_plain(batch.column(name)).take(pa.array(parents)) for name in names}
    keys = pa.array(first_row + parents).cast(pa.string())
    return pa.RecordBatch.from_pydict(
        others | {image: elements, KEYS: keys, MEMBERS: pa.array(members, pa.string())}
    )
