"""Join the rows of two outputs by key and image, in bounded memory.

Both outputs are first split into files on a local disk, by a hash of the key, so that both rows of an image
are in files of the same number. Then one pair of files after the other is joined in memory.
"""

from __future__ import annotations

import tempfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.compare.plain_rows import Rows

COLUMNS = ("key", "shard", "row", "sha256", "caption", "logprob", "status", "error", "width", "height")
ROWS_AT_ONCE = 100_000
"""Rows of one output that are joined in memory."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Pair:
    """Two rows with the same key and the same image. If either has no image, the key decides."""

    before: Row
    after: Row


class Join:
    """Iterate once over all pairs; then the counts of what has no partner are complete."""

    def __init__(self, before: Rows, after: Rows, num_rows: int, others: Sequence[str]) -> None:
        """Prepare a join.

        Args:
            num_rows: about how many rows the larger output has.
            others: further columns that the rows shall have, where an output has them.
        """
        self._sides = (before, after)
        self._columns = [*COLUMNS, *others]
        self._num_parts = 1 + num_rows // ROWS_AT_ONCE
        self.unmatched: Counter[str] = Counter()
        """Rows without a partner: "only in A", "only in B", and "other image": the same key, other bytes."""

    def __iter__(self) -> Iterator[Pair]:
        with tempfile.TemporaryDirectory(prefix="blip2-compare-") as folder:
            for side, rows in enumerate(self._sides):
                self._split(rows, Path(folder), side)
            for part in range(self._num_parts):
                before, after = (_read(Path(folder) / f"{side}-{part}") for side in (0, 1))
                yield from self._match(before, after)

    def _split(self, rows: Rows, folder: Path, side: int) -> None:
        """Write the rows of an output into as many files as there are parts."""
        writers: dict[int, pa.RecordBatchFileWriter] = {}
        with ExitStack() as files:
            for table in rows.tables(self._columns):
                table = table.replace_schema_metadata(None)
                hashes = np.fromiter(
                    (zlib.crc32(key.encode()) for key in table["key"].to_pylist()), np.int64, len(table)
                )
                for part in np.unique(hashes % self._num_parts).tolist():
                    if part not in writers:
                        file = pa.ipc.new_file(str(folder / f"{side}-{part}"), table.schema)
                        writers[part] = files.enter_context(file)
                    writers[part].write_table(table.filter(pa.array(hashes % self._num_parts == part)))

    def _match(self, before: list[Row], after: list[Row]) -> Iterator[Pair]:
        """Yield the pairs of two parts, and count the rest."""
        by_key: dict[str, list[Row]] = defaultdict(list)
        for row in after:
            by_key[row["key"]].append(row)
        for row in before:
            candidates = by_key.get(row["key"], [])
            partner = _partner(row, candidates)
            if partner is not None:
                candidates.remove(partner)
                yield Pair(row, partner)
            elif candidates:
                candidates.pop(0)
                self.unmatched["other image"] += 1
            else:
                self.unmatched["only in A"] += 1
        self.unmatched += Counter({"only in B": sum(map(len, by_key.values()))})  # which keeps no zero


def _partner(row: Row, candidates: Sequence[Row]) -> Row | None:
    """Return the candidate with the same image, the one of the same shard if several have it."""
    same = []
    for one in candidates:
        if one["sha256"] == row["sha256"] and one["shard"] == row["shard"]:
            return one  # Usually the first: tables without a key column have the same keys in each file.
        if None in (row["sha256"], one["sha256"]) or row["sha256"] == one["sha256"]:
            same.append(one)
    return min(
        same, key=lambda one: (one["shard"] != row["shard"], one["sha256"] != row["sha256"]), default=None
    )


def _read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with pa.ipc.open_file(str(path)) as file:
        return file.read_all().to_pylist()
