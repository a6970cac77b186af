"""Merge the rows of a shard from many pieces, in row order, in little memory.

A piece is a fragment, several small fragments, or a row group of the shard's existing file. The first pass
reads which rows the pieces hold; it needs about 60 bytes a row. The second pass reads each piece again when
its rows are due, and yields the rows of one row group at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from blip2_actor import Status
from pipeline.schema import to_plain
from pipeline.storage.filesystems import MAX_CONCURRENT_REQUESTS

HELD_BYTES = 64 << 20
"""Pieces of up to this size are kept from one pass, and from one row group, to the next."""
JOINED_BYTES, JOINED_PIECES = 4 << 20, 64
"""Small pieces that follow each other are joined up to this size and number: a table needs 20 kB of memory,
however few rows it has (pyarrow 26)."""
ROW_GROUP_BYTES = 32 << 20
MAX_ROW_GROUP_ROWS = 65_536

_INDEX = pa.schema(
    {
        "row": pa.int64(),
        "key": pa.string(),
        "status": pa.string(),
        "piece": pa.int32(),
        "position": pa.int32(),
    }
)
"""What the first pass keeps of each row: these columns, and where the row is."""

Piece = Callable[[], "pa.Table | None"]
"""Reads rows; returns None when they are no longer there."""


class PieceGone(Exception):
    """Another process has deleted a piece or begun the shard again, and commits the shard itself."""


class Merge:
    """The rows of several pieces, each row number once: an ok row if there is one, else the first piece's.

    Args:
        pieces: in any order.

    Raises:
        PieceGone: a piece is no longer there. Without it, a failed row could replace an ok one.
    """

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._pieces: list[Piece] = []
        self._held: dict[int, pa.Table] = {}
        self._held_bytes = 0
        row_bytes = []
        schemas: dict[pa.Schema, None] = {}
        parts = []
        for number, (piece, table) in enumerate(_read_joined(pieces)):
            self._pieces.append(piece)
            row_bytes.append(table.nbytes / max(1, len(table)))
            if not len(table):
                continue
            schemas[table.schema] = None
            parts.append(_index(number, table))
            self._hold(number, table)
        self._row_bytes = np.array(row_bytes)
        self.schema = pa.unify_schemas([*schemas], promote_options="permissive") if schemas else None
        self._rows = pa.concat_tables([_INDEX.empty_table(), *parts])
        self._order = self._find_order()
        self.numbers: np.ndarray = self._rows["row"].to_numpy()[self._order]
        """int64[N], the row numbers, ascending."""

    def first_conflict(self) -> tuple[int, str, str] | None:
        """Return a row that has different keys in two pieces, with both keys, or None."""
        if len(self.numbers) == len(self._rows):
            return None
        keys = self._rows.group_by("row").aggregate([("key", "min"), ("key", "max")]).sort_by("row")
        conflicts = keys.filter(pc.not_equal(keys["key_min"], keys["key_max"]))
        if not len(conflicts):
            return None
        (row,) = conflicts.slice(0, 1).to_pylist()
        return row["row"], row["key_min"], row["key_max"]

    def by_status(self, num_rows: int) -> dict[str, int]:
        """Count the statuses of the first rows."""
        statuses = self._rows["status"].take(pa.array(self._order[:num_rows]))
        return dict(sorted(Counter(statuses.to_pylist()).items()))

    def row_groups(self, num_rows: int) -> Iterator[pa.Table]:
        """Yield the first rows in order, a row group at a time.

        Raises:
            PieceGone: a piece that is still needed is no longer there.
        """
        chosen = self._rows.select(["piece", "position"]).take(pa.array(self._order[:num_rows]))
        pieces, positions = chosen["piece"].to_numpy(), chosen["position"].to_numpy()
        last_use = np.full(len(self._pieces), -1)
        last_use[pieces] = np.arange(num_rows)  # The last assignment counts.
        num_bytes = np.cumsum(self._row_bytes[pieces])
        start = 0
        while start < num_rows:
            limit = ROW_GROUP_BYTES + (num_bytes[start - 1] if start else 0)
            stop = max(start + 1, int(np.searchsorted(num_bytes, limit, "right")))
            stop = min(stop, start + MAX_ROW_GROUP_ROWS)
            yield self._take(pieces[start:stop], positions[start:stop])
            self._release(last_use >= stop)
            start = stop

    def _find_order(self) -> np.ndarray:
        """Return the places in `_rows` of the rows that count, by ascending row number."""
        numbers = self._rows["row"].to_numpy()
        not_ok = pc.not_equal(self._rows["status"], Status.OK.value).to_numpy()
        order = np.lexsort((self._rows["piece"].to_numpy(), not_ok, numbers))
        first = np.ones(len(order), bool)
        first[1:] = numbers[order][1:] != numbers[order][:-1]
        return order[first]

    def _take(self, pieces: np.ndarray, positions: np.ndarray) -> pa.Table:
        assert self.schema is not None
        needed = np.unique(pieces)
        missing = [n for n in needed if n not in self._held]
        self._held.update(zip(missing, _read([self._pieces[n] for n in missing]), strict=True))
        parts, places = [self.schema.empty_table()], []
        for number in needed:
            places.append(np.flatnonzero(pieces == number))
            parts.append(self._held[number].take(pa.array(positions[places[-1]])))
        joined = pa.concat_tables(parts, promote_options="permissive")
        return joined.take(pa.array(np.argsort(np.concatenate(places), kind="stable")))

    def _hold(self, number: int, table: pa.Table) -> None:
        num_bytes = table.nbytes
        if self._held_bytes + num_bytes <= HELD_BYTES:
            self._held[number] = table
            self._held_bytes += num_bytes

    def _release(self, is_needed: np.ndarray) -> None:
        held, self._held, self._held_bytes = self._held, {}, 0
        for number, table in held.items():
            if is_needed[number]:
                self._hold(number, table)


def _read_joined(pieces: Sequence[Piece]) -> Iterator[tuple[Piece, pa.Table]]:
    """Yield pieces with their rows; small ones that follow each other are one piece."""
    some: list[Piece] = []
    tables: list[pa.Table] = []
    num_bytes = 0
    for piece, table in zip(pieces, _read(pieces), strict=True):
        if some and (num_bytes + table.nbytes > JOINED_BYTES or len(some) == JOINED_PIECES):
            yield partial(_read_as_one, some), _as_one(tables)
            some, tables, num_bytes = [], [], 0
        num_bytes += table.nbytes
        some.append(piece)
        tables.append(table)
    if some:
        yield partial(_read_as_one, some), _as_one(tables)


def _read_as_one(pieces: Sequence[Piece]) -> pa.Table | None:
    tables = [piece() for piece in pieces]
    return None if any(table is None for table in tables) else _as_one([_plain(table) for table in tables])


def _as_one(tables: Sequence[pa.Table]) -> pa.Table:
    if len(tables) == 1:
        return tables[0]
    return pa.concat_tables(tables, promote_options="permissive").combine_chunks()


def _read(pieces: Sequence[Piece]) -> Iterator[pa.Table]:
    """Read pieces, several at the same time but never all, and yield their rows in order.

    Raises:
        PieceGone: a piece is no longer there.
    """
    with ThreadPoolExecutor(MAX_CONCURRENT_REQUESTS) as pool:
        for start in range(0, len(pieces), MAX_CONCURRENT_REQUESTS):
            for table in pool.map(lambda read: read(), pieces[start : start + MAX_CONCURRENT_REQUESTS]):
                if table is None:
                    raise PieceGone
                yield _plain(table)


def _plain(table: pa.Table) -> pa.Table:
    """Return a table without metadata, and without the types that cannot be joined or taken from."""
    columns = [to_plain(column) for column in table.columns]
    fields = zip(table.schema, columns, strict=True)
    return pa.table(columns, pa.schema([field.with_type(column.type) for field, column in fields]))


def _index(number: int, table: pa.Table) -> pa.Table:
    """Return what the first pass keeps of a piece."""
    places = np.arange(len(table), dtype=np.int32)
    columns = [*table.select(["row", "key", "status"]).columns, np.full_like(places, number), places]
    return pa.table(columns, schema=_INDEX)
