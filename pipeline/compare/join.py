"""Join the rows of two outputs by key and image, in bounded memory.

Both outputs are first split into files on a local disk, by a hash of the key, so that both rows of an image
are in files of the same number. Then one pair of files after the other is joined in memory.
"""

from __future__ import annotations

import math
import tempfile
import zlib
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.compare.plain_rows import Rows

COLUMNS = ("key", "shard", "row", "sha256", "caption", "logprob", "status", "error", "width", "height")
ROWS_AT_ONCE = 100_000
"""Rows of one output that are joined in memory, as far as `MAX_PARTS` files have room for all."""
MAX_PARTS = 512
"""Files that are open at once; most systems let a process open 1,024."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Pair:
    """Two rows with the same key and the same image. If either has no image, the key decides."""

    before: Row
    after: Row

    @property
    def logprob_change(self) -> float | None:
        """How much higher the log-probability of B's caption is, by B's model, than that of A's by A's."""
        before, after = self.before.get("logprob"), self.after.get("logprob")
        if before is None or after is None or not math.isfinite(after - before):
            return None
        return after - before


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
        self._num_parts = min(MAX_PARTS, 1 + num_rows // ROWS_AT_ONCE)
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
        """Yield the pairs of two parts, the surest first, and count the rest."""
        for of_before, of_after in PASSES:
            waiting: dict[Hashable, deque[Row]] = defaultdict(deque)
            for row in after:
                waiting[of_after(row)].append(row)
            waiting.pop(None, None)
            left = []
            for row in before:
                partners = waiting.get(of_before(row))
                if partners:
                    yield Pair(row, partners.popleft())
                else:
                    left.append(row)
            unpaired = {id(row) for rows in waiting.values() for row in rows}
            after = [row for row in after if id(row) in unpaired or of_after(row) is None]
            before = left
        numbers = [Counter(row["key"] for row in side) for side in (before, after)]
        other_image = (numbers[0] & numbers[1]).total()
        self.unmatched += Counter(  # which keeps no zero
            {
                "other image": other_image,
                "only in A": len(before) - other_image,
                "only in B": len(after) - other_image,
            }
        )


def _by(*columns: str, only_without_image: bool = False) -> Callable[[Row], Hashable]:
    """Return what rows must have in common: key and columns; None for a row that is left out."""

    def of(row: Row) -> Hashable:
        is_out = row["sha256"] is not None if only_without_image else None in [row[name] for name in columns]
        return None if is_out else (row["key"], *(row[name] for name in columns))

    return of


PASSES = (
    (_by("sha256", "shard"), _by("sha256", "shard")),
    (_by("sha256"), _by("sha256")),
    (_by("shard", only_without_image=True), _by("shard")),
    (_by("shard"), _by("shard", only_without_image=True)),
    (_by(only_without_image=True), _by()),
    (_by(), _by(only_without_image=True)),
)
"""What a row of each side must have in common to be a pair, from the surest to the least sure. All rows go
through a pass before the next one: a row must not take the partner of a later row. Tables without a key
column have the same keys in each file."""


def _read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with pa.ipc.open_file(str(path)) as file:
        return file.read_all().to_pylist()
