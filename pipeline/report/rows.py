"""Read the rows of an output in constant memory: one row group of one finished file at a time.

Rows come in the order of the run's shards, and in the order of the input inside each. Only finished shards
have a file; the rows of the others are not shown before their shard is finished.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.ledger.layout import output_name
from pipeline.ledger.ledger import Ledger
from pipeline.ledger.run_record import Run
from pipeline.progress.wording import count, cut, escaped
from pipeline.schema import ROW_CONTRACT
from pipeline.storage.folder import Folder

BATCH_ROWS = 256
MAX_VALUE_CHARS = 200


@dataclass(frozen=True)
class FinishedRows:
    """The finished shards of a run."""

    folder: Folder
    run: Run
    shards: tuple[str, ...]
    """Names of the finished shards, in the order of the run."""

    @classmethod
    def find(cls, uri: str, inputs: Sequence[str] = ()) -> FinishedRows:
        """Find the finished shards in an output folder.

        Args:
            uri: the output folder.
            inputs: the inputs of the run with the passwords and options that its record leaves out.

        Raises:
            ValueError: the folder holds no run, or the run has not finished a shard yet.
        """
        folder = Folder(uri)
        ledger = Ledger(folder)
        run = ledger.require_run(inputs)
        finished = ledger.of(run).scan().finished
        shards = tuple(shard.name for shard in run.shards if shard.name in finished)
        if not shards:
            raise ValueError(f"{folder} has no finished shard yet; wait until the run has finished one")
        return cls(folder, run, shards)

    @property
    def unfinished(self) -> str | None:
        """How many shards of the run have no file yet, in words; None if all have one."""
        total = len(self.run.shards)
        left = total - len(self.shards)
        has = "has" if left == 1 else "have"
        return f"{left:,} of {count(total, 'shard')} {has} no file yet" if left else None

    def schema(self) -> pa.Schema:
        """Return the schema of the tables of the first file."""
        return schema_of(self.folder, self.shards[0])

    def num_rows(self, shard: str) -> int:
        """Return the number of rows of a finished shard."""
        with self.folder.open(output_name(shard)) as file:
            return pq.read_metadata(file).num_rows

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Yield the rows of all finished shards; see `tables_of`."""
        for shard in self.shards:
            yield from tables_of(self.folder, shard, columns)


def schema_of(folder: Folder, shard: str) -> pa.Schema:
    """Return the schema of the tables of one finished shard."""
    with folder.open(output_name(shard)) as file:
        return _without_extensions(pq.read_schema(file).empty_table()).schema


def tables_of(folder: Folder, shard: str, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """Yield the rows of one finished shard in order, a row group at a time.

    Kept columns of UUIDs and of JSON become text: Arrow neither sorts nor writes these types.

    Args:
        columns: names of the columns to read; default: all. A column that the file lacks is left out.
    """
    with folder.open(output_name(shard)) as file:
        parquet = pq.ParquetFile(file)
        found = columns and [name for name in columns if name in parquet.schema_arrow.names]
        for group in range(parquet.num_row_groups):
            yield _without_extensions(parquet.read_row_group(group, columns=found))


def rows_in(tables: Iterable[pa.Table]) -> Iterator[dict[str, Any]]:
    """Yield the rows of tables, of which only a few at a time are Python objects."""
    for table in tables:
        for batch in table.to_batches(max_chunksize=BATCH_ROWS):
            yield from batch.to_pylist()


def _without_extensions(table: pa.Table) -> pa.Table:
    for position, field in enumerate(table.schema):
        if isinstance(field.type, pa.UuidType):
            texts = [None if value is None else str(value) for value in table[position].to_pylist()]
            table = table.set_column(position, field.name, pa.chunked_array([pa.array(texts, pa.string())]))
        elif isinstance(field.type, pa.BaseExtensionType):
            storage = [chunk.storage for chunk in table[position].chunks]
            table = table.set_column(position, field.name, pa.chunked_array(storage, field.type.storage_type))
    return table


def json_line(row: Mapping[str, Any]) -> str:
    """Return a row as one line of JSON without its line end.

    Bytes become hexadecimal digits, NaN and infinity null, times ISO 8601. Control characters are escaped, so
    that the line is safe in a terminal.
    """
    return escaped(json.dumps(plain_value(row), ensure_ascii=False, allow_nan=False))


def one_line(text: str) -> str:
    """Return a text that stays on one line of a terminal: blanks for line ends, escapes for control codes."""
    return escaped(" ".join(text.splitlines()).replace("\t", " "))


def is_own_column(name: str) -> bool:
    """Whether the user asked for the column: an answer, an embedding, a score or a kept column."""
    return name not in ROW_CONTRACT.names


def short_value(value: Any, max_chars: int | None = MAX_VALUE_CHARS) -> str:
    """Return a value of a row on one line: the size of lists and bytes, and the beginning of long texts."""
    if isinstance(value, (list, bytes)):
        return f"{len(value):,} {'bytes' if isinstance(value, bytes) else 'values'}"
    text = one_line(f"{value:.4g}" if isinstance(value, float) else str(value))
    return text if max_chars is None else cut(text, max_chars)


def plain_value(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, Mapping):
        return {str(name): plain_value(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_value(item) for item in value]
    if isinstance(value, (datetime, date, time)):
        return value.isoformat()
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)
