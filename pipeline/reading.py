"""What is asked of a reader and what it gives: options, work, report, and the columns of its tables.

Every reader numbers the rows of the whole shard from 0, skips those that are not asked for, and
gives small Arrow tables in order. Twice the same work gives twice the same tables.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import pyarrow as pa

from pipeline.shards import Shard

END = 2**63 - 1
"""The stop of a row range that goes on to the end of its shard, however long that is."""

READ_COLUMNS = {
    "key": pa.string(),
    "shard": pa.string(),
    "row": pa.int64(),
    "image": pa.binary(),  # encoded bytes as they came; null when there are none
    "status": pa.string(),  # a blip2_actor Status when reading already settled the row, else null
    "error": pa.string(),  # one sentence when status is not null
}
"""First columns of every table; then `prompt` (string) when a prompt column is named, then kept columns."""

Tables = Generator[pa.Table, None, "ShardReport"]


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """Which columns of a table, or members of a tar's samples, are read. Part of a run's fingerprint."""

    image_column: str | None = None
    """Column with the image, or the extension of the image member (`jpg`, `left.png`); None finds it."""
    key_column: str | None = None
    """Parquet column with each row's key; None takes `__key__` or `key`, else the row number in the file."""
    prompt_column: str | None = None
    """Column, or member extension, with each row's own prompt."""
    keep: tuple[str, ...] = ()
    """Columns, or member extensions, carried to the output; `new=old` renames one on the way."""
    max_image_bytes: int = 128 << 20
    """A larger image file is not read; its row gets the status `too_large`."""
    table_rows: int = 512
    """Most rows of one table."""
    table_bytes: int = 16 << 20
    """A table ends when it holds this many bytes of images."""

    @property
    def kept(self) -> dict[str, str]:
        """Output name to source name, in the order asked for."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class ShardWork:
    """One shard and the rows of it that are still to do."""

    shard: Shard
    missing: tuple[tuple[int, int], ...] | None = None
    """Sorted half-open row ranges; the last may stop at END. None is every row."""


@dataclass(frozen=True, kw_only=True)
class ShardReport:
    """How reading a shard ended."""

    shard: str
    num_rows: int
    """Rows that the shard has, as far as it could be read; also those that were not asked for."""
    complete: bool
    """False when the shard holds, or may hold, more than could be read."""
    reason: str | None = None
    """One sentence when not complete."""
