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
        ("starts", pa.list_(pa.int64())),
        ("stops", pa.list_(pa.int64())),
        ("statuses", pa.list_(pa.string())),
        ("counts", pa.list_(pa.int64())),
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
    return pa.table(
        {
            "shard": [receipt.shard for receipt in receipts],
            "starts": [[start for start, _ in receipt.ranges] for receipt in receipts],
            "stops": [[stop for _, stop in receipt.ranges] for receipt in receipts],
            "statuses": [[status for status, _ in receipt.by_status] for receipt in receipts],
            "counts": [[count for _, count in receipt.by_status] for receipt in receipts],
        },
        schema=SCHEMA,
    )


def receipts_from_table(table: pa.Table) -> Iterator[Receipt]:
    """Yield the receipts of a table that `receipts_to_table` has made."""
    for row in table.to_pylist():
        yield Receipt(
            row["shard"],
            tuple(zip(row["starts"], row["stops"], strict=True)),
            tuple(zip(row["statuses"], row["counts"], strict=True)),
        )
