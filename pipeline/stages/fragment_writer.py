"""`FragmentWriter`: the rows that several captioning calls have finished, in few fragments.

Calls of one process often hold rows of the same shard. Each fragment costs requests to an object store, so
a call waits for a moment, until other calls have finished rows of that shard too.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.ledger.ledger import Ledger
from pipeline.metrics import FRAGMENTS

FRAGMENT_ROWS, FRAGMENT_BYTES = 512, 32 << 20
"""A fragment with this many rows or bytes is written at once. One of twice the bytes is split: a commit holds
pieces of this size, and would read a larger one again for each row group."""
HOLD_S = 1.5
"""A fragment is also written when its first rows have waited this long."""
QUIET_S, QUIET_PART = 0.25, 0.02
"""When every call waits, another may still begin: in a store, where each fragment costs requests, the largest
one waits until no rows have come for this long, but at most for this part of the age of the process, so that
a short job does not wait. A disk gains nothing from it: with an engine that costs nothing, a job makes 4,300
rows/s without the wait, and 3,000 with it (two cores, 2026-11-27)."""


@dataclass
class _Batch:
    """Rows of one shard that become one fragment."""

    shard: str
    due: float
    """When they are written at the latest, in seconds of a monotonic clock."""
    last: float
    """When the last rows were added."""
    tables: list[pa.Table] = field(default_factory=list)
    num_bytes: int = 0
    written: Future[None] = field(default_factory=Future)

    @property
    def num_rows(self) -> int:
        return sum(map(len, self.tables))


class FragmentWriter:
    """Writes rows for all calls of a process; thread-safe."""

    def __init__(self, ledger: Ledger, fragment_rows: int = FRAGMENT_ROWS, hold_s: float = HOLD_S) -> None:
        """Prepare to write.

        Args:
            ledger: the output; its requests are retried.
            fragment_rows: rows of one shard that are written without waiting for more.
            hold_s: seconds for which rows may wait.
        """
        self._ledger = ledger
        self._fragment_rows = fragment_rows
        self._hold_s = hold_s
        self._quiet_s = 0.0 if ledger.folder.is_local else QUIET_S
        self._started = time.monotonic()
        self._changed = threading.Condition()
        self._open: dict[str, _Batch] = {}
        self._num_calls = 0
        self.busy_s = 0.0
        """Seconds spent with writing, without the wait for more rows."""
        self.num_held = 0
        """Rows that are not written yet."""

    @contextmanager
    def call(self) -> Iterator[None]:
        """Count a call as one that may still write rows; the others wait for it."""
        with self._changed:
            self._num_calls += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_calls -= 1
                self._changed.notify_all()

    def write(self, rows: pa.Table) -> None:
        """Return when these rows are in fragments.

        Args:
            rows: of one or several shards, each row number once.

        Raises:
            OSError: the output cannot be written.
        """
        parts = sorted(split_by_shard(rows), key=len, reverse=True)  # The largest is the first to go.
        batches = [self._add(part) for part in parts]
        try:
            for batch in batches:
                if self._take_when_due(batch):
                    self._write(batch)
                batch.written.result()
        except BaseException:
            for batch, part in zip(batches, parts, strict=True):
                self._take_back(batch, part)
            raise

    def _add(self, rows: pa.Table) -> _Batch:
        with self._changed:
            shard = rows["shard"][0].as_py()
            now = time.monotonic()
            batch = self._open.setdefault(shard, _Batch(shard, now + self._hold_s, now))
            batch.tables.append(rows)
            batch.num_bytes += rows.nbytes
            batch.last = now
            self.num_held += len(rows)
            self._changed.notify_all()
            return batch

    def _take_back(self, batch: _Batch, rows: pa.Table) -> None:
        """Take the rows of a failed call out of a batch, unless it is being written already."""
        with self._changed:
            if self._open.get(batch.shard) is not batch:
                return
            batch.tables = [table for table in batch.tables if table is not rows]
            batch.num_bytes -= rows.nbytes
            self.num_held -= len(rows)
            if not batch.tables:
                del self._open[batch.shard]
            self._changed.notify_all()

    def _take_when_due(self, batch: _Batch) -> bool:
        """Wait until a batch is due; return whether this call must write it."""
        with self._changed:
            while self._open.get(batch.shard) is batch:
                wait_s = self._wait_s(batch)
                if wait_s <= 0:
                    del self._open[batch.shard]
                    return True
                self._changed.wait(wait_s)
            return False

    def _wait_s(self, batch: _Batch) -> float:
        """Return how long a batch still waits if nothing changes; 0 or less if it is due."""
        if batch.num_rows >= self._fragment_rows or batch.num_bytes >= FRAGMENT_BYTES:
            return 0.0
        now = time.monotonic()
        due = batch.due
        num_waiting = sum(len(other.tables) for other in self._open.values())
        if num_waiting >= self._num_calls and batch.num_rows == max(b.num_rows for b in self._open.values()):
            quiet_s = min(self._quiet_s, QUIET_PART * (now - self._started)) if self._num_calls else 0.0
            due = min(due, batch.last + quiet_s)
        return due - now

    def _write(self, batch: _Batch) -> None:
        started = time.monotonic()
        try:
            try:
                for table in _joined(batch.tables):
                    for rows in _split_by_size(table):
                        self._ledger.write_fragment(rows)
                        FRAGMENTS.inc()
            finally:
                with self._changed:
                    self.busy_s += time.monotonic() - started
                    self.num_held -= batch.num_rows
        except BaseException as error:  # Raised by each call that has rows in it.
            batch.written.set_exception(error)
        else:
            batch.written.set_result(None)


def _joined(tables: Sequence[pa.Table]) -> Sequence[pa.Table]:
    """Join tables, unless types differ or a row is in two of them, as when Ray runs a call twice."""
    if any(table.schema != tables[0].schema for table in tables):
        return tables
    rows = pa.concat_tables(tables)
    return [rows] if pc.count_distinct(rows["row"]).as_py() == len(rows) else tables


def _split_by_size(rows: pa.Table) -> list[pa.Table]:
    """Return rows in parts of at most twice `FRAGMENT_BYTES`, or of one row."""
    if len(rows) == 1 or rows.nbytes <= 2 * FRAGMENT_BYTES:
        return [rows]
    half = len(rows) // 2
    return [*_split_by_size(rows.slice(0, half)), *_split_by_size(rows.slice(half))]


def split_by_shard(rows: pa.Table) -> Sequence[pa.Table]:
    """Return the rows of each shard."""
    shards = pc.unique(rows["shard"]).to_pylist()
    return [rows.filter(pc.equal(rows["shard"], shard)) for shard in shards]
