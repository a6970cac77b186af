"""Rows in plain Parquet files, which no run of the batch job has written but which have its columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.ledger.layout import RUN_FILE, is_result
from pipeline.report.rows import FinishedRows
from pipeline.storage.folder import Folder

NEEDED = ("key", "shard", "row", "sha256", "caption", "status", "error", "width", "height")


class Rows(Protocol):
    """What is compared: the rows of a run, or of plain files."""

    @property
    def folder(self) -> Folder: ...

    def schema(self) -> pa.Schema:
        """Return the schema of the first file."""
        ...

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Yield all rows; a column that a file lacks is left out."""
        ...


@dataclass(frozen=True)
class PlainRows:
    """The Parquet files of a folder."""

    folder: Folder
    names: tuple[str, ...]

    @property
    def num_rows(self) -> int:
        """Rows of all files."""
        return sum(self.folder.read(name, pq.read_metadata).num_rows for name in self.names)

    def schema(self) -> pa.Schema:
        return self.folder.read(self.names[0], pq.read_schema)

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        for name in self.names:
            with self.folder.open(name) as file:
                parquet = pq.ParquetFile(file)
                found = columns and [column for column in columns if column in parquet.schema_arrow.names]
                for group in range(parquet.num_row_groups):
                    yield parquet.read_row_group(group, columns=found)


def find_rows(uri: str) -> FinishedRows | PlainRows:
    """Find the rows in a folder.

    Raises:
        ValueError: it holds no run with a finished shard, and no Parquet files with the columns of one.
    """
    folder = Folder(uri)
    plain = () if folder.exists(RUN_FILE) else tuple(sorted(filter(is_result, folder.names())))
    if not plain:
        return FinishedRows.find(uri)
    rows = PlainRows(folder, plain)
    lacking = [name for name in NEEDED if name not in rows.schema().names]
    if lacking:
        raise ValueError(
            f"{folder} must hold a run, or Parquet files with the columns of one; {plain[0]} has no "
            f"{', '.join(lacking)}"
        )
    return rows
