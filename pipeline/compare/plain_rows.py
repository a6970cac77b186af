"""Rows in plain Parquet files, which no run of the batch job has written but which have its columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.ledger.layout import RUN_FILE, is_result
from pipeline.report.rows import FinishedRows
from pipeline.schema import ROW_CONTRACT, cast_to, plain_type, to_plain
from pipeline.storage.folder import Folder

NEEDED = ("key", "shard", "row", "sha256", "caption", "status", "error", "width", "height")


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
        """Return the columns of all files, each as the first file has it.

        Raises:
            ValueError: a file lacks a column of a run.
        """
        fields = {field.name: field for schema in reversed(self._schemas) for field in schema}
        return pa.schema(fields.values())

    @cached_property
    def _schemas(self) -> list[pa.Schema]:
        schemas = []
        for name in self.names:
            schema = self.folder.read(name, pq.read_schema)
            lacking = [column for column in NEEDED if column not in schema.names]
            if lacking:
                raise ValueError(
                    f"{self.folder} must hold a run, or Parquet files with the columns of one; {name} has no "
                    f"{', '.join(lacking)}"
                )
            schemas.append(pa.schema([pa.field(field.name, _type_of(field)) for field in schema]))
        return schemas

    def _unified(self, columns: Sequence[str] | None) -> pa.Schema:
        """Return columns with one type each in all files: pandas writes one without values as null."""
        chosen = (
            pa.schema([field for field in schema if columns is None or field.name in columns])
            for schema in self._schemas
        )
        try:
            return pa.unify_schemas(list(chosen), promote_options="permissive")
        except pa.ArrowException as error:
            raise ValueError(
                f"{self.folder} must hold files whose columns have one type each: {error}"
            ) from error

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Yield all rows.

        Raises:
            ValueError: a file has a row without a key, or a column has another type than in the others.
        """
        wanted = self._unified(columns)
        for name in self.names:
            with self.folder.open(name) as file:
                parquet = pq.ParquetFile(file)
                found = [field.name for field in wanted if field.name in parquet.schema_arrow.names]
                for group in range(parquet.num_row_groups):
                    rows = parquet.read_row_group(group, columns=found)
                    if rows["key"].null_count:
                        raise ValueError(f"{name} in {self.folder} must have a key in every row, got null")
                    try:
                        yield pa.table([_column(rows, field) for field in wanted], wanted)
                    except pa.ArrowException as error:
                        raise ValueError(
                            f"{name} in {self.folder} must have the types of a run: {error}"
                        ) from error


def _type_of(field: pa.Field) -> pa.DataType:
    is_known = field.name in (*NEEDED, "logprob")
    return ROW_CONTRACT.field(field.name).type if is_known else plain_type(field.type)


def _column(rows: pa.Table, field: pa.Field) -> pa.Array | pa.ChunkedArray:
    """Return a column of a file in its type in all files; null if the file lacks it."""
    if field.name not in rows.column_names:
        return pa.nulls(len(rows), field.type)
    return cast_to(to_plain(rows[field.name]), field.type)


Rows = FinishedRows | PlainRows


def find_rows(uri: str) -> Rows:
    """Find the rows in a folder.

    Raises:
        ValueError: it holds no run with a finished shard, and no Parquet files with the columns of one.
    """
    folder = Folder(uri)
    plain = () if folder.file(RUN_FILE) else tuple(sorted(filter(is_result, folder.names())))
    if not plain:
        return FinishedRows.find(uri)
    rows = PlainRows(folder, plain)
    rows.schema()  # which refuses other files
    return rows
