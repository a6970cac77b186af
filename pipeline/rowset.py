"""`RowSet`: which rows of a shard are finished, as sorted disjoint ranges.

Progress is a set union: a row number counts once, however often the row was written. The million rows of a
shard are a few ranges, so that the driver's memory stays constant.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator

Range = tuple[int, int]
"""Rows from start (included) to stop (excluded)."""


class RowSet:
    """A set of row numbers that grows by union."""

    def __init__(self, ranges: Iterable[Range] = ()) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []
        self.update(ranges)

    def add(self, start: int, stop: int) -> None:
        """Add the rows from start (included) to stop (excluded)."""
        if start >= stop:
            return
        # Ranges that overlap or touch [start, stop) become one.
        low = bisect_left(self._stops, start)
        high = bisect_right(self._starts, stop)
        if low < high:
            start = min(start, self._starts[low])
            stop = max(stop, self._stops[high - 1])
        self._starts[low:high] = [start]
        self._stops[low:high] = [stop]

    def update(self, ranges: Iterable[Range]) -> None:
        """Add the rows of all ranges."""
        for start, stop in ranges:
            self.add(start, stop)

    def covers(self, num_rows: int) -> bool:
        """Return whether every row from 0 to num_rows (excluded) is in the set."""
        return next(self.missing(num_rows), None) is None

    def missing(self, num_rows: int | None) -> Iterator[tuple[int, int | None]]:
        """Yield the ranges below num_rows that are not in the set; None means an unknown end."""
        start_of_gap = 0
        for start, stop in self:
            if num_rows is not None and start >= num_rows:
                break
            if start_of_gap < start:
                yield start_of_gap, start
            start_of_gap = stop
        if num_rows is None or start_of_gap < num_rows:
            yield start_of_gap, num_rows

    def __iter__(self) -> Iterator[Range]:
        return iter(zip(self._starts, self._stops, strict=True))

    def __contains__(self, row: int) -> bool:
        index = bisect_right(self._starts, row) - 1
        return index >= 0 and row < self._stops[index]

    def __len__(self) -> int:
        return sum(self._stops) - sum(self._starts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RowSet) and list(self) == list(other)

    def __repr__(self) -> str:
        return f"RowSet({list(self)})"


def ranges_of(rows: Iterable[int]) -> Iterator[Range]:
    """Yield the ranges of ascending row numbers; a number that is repeated at once counts once."""
    start = stop = None
    for row in rows:
        if start is None or stop is None:
            start, stop = row, row + 1
        elif row == stop:
            stop += 1
        elif row != stop - 1:
            yield start, stop
            start, stop = row, row + 1
    if start is not None and stop is not None:
        yield start, stop
