"""`Receipt`: which rows have reached a fragment. The write stage returns receipts instead of rows.

Rows go from the stage straight into the output folder; only receipts cross Ray's object store.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa

from pipeline.rowset import Range

SCHEMA = pa.schema(
    [
        ("shard", pa.string()),
        ("ranges", pa.list_(pa.list_(pa.int64()))),
        ("by_status", pa.map_(pa.string(), pa.int64())),
    ]
)
"""A receipt as a row of an Arrow table."""


@dataclass(frozen=True)
class Receipt:
    """Rows of one shard that have reached a fragment."""

    shard: str
    ranges: tuple[Range, ...]
    """The row numbers."""
    by_status: tuple[tuple[str, int], ...]
    """The number of rows of each status."""


def receipts_to_table(receipts: Sequence[Receipt]) -> pa.Table:
    """Convert receipts to a table with the columns of `SCHEMA`."""
    return pa.Table.from_pylist([vars(receipt) for receipt in receipts], SCHEMA)


def receipts_from_table(table: pa.Table) -> Iterator[Receipt]:
    """Yield the receipts of a table that `receipts_to_table` has made."""
    for row in table.to_pylist():
        yield Receipt(row["shard"], tuple(map(tuple, row["ranges"])), tuple(row["by_status"]))
