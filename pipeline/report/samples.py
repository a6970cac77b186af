"""Choose the rows of the contact sheet while an output is read once, in bounded memory."""

from __future__ import annotations

import zlib

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from blip2_actor import Status

GROUPS = {
    "random": "random rows",
    "unlikely": "lowest log-probability",
    "longest": "longest captions",
    "flagged": "flagged",
    "failed": "failed",
    "duplicates": "near-duplicates",
}
"""Groups of rows by name, with their labels, in the order of the sheet."""
NUM_RANDOM = 210
NUM_OTHERS = 36
"""Maximum number of rows in each of the other groups."""
MAX_KEYS = 1_000_000
"""Rows that are compared with each other: of a larger output, those whose captions have the lowest hashes."""
MAX_PARTS = 10_000
"""Arrays that are kept side by side: one of a single row takes more than ten times the memory of the row."""


class Smallest:
    """Keeps the rows with the smallest scores; of equal scores, those with the smallest numbers.

    At most twice as many rows are held, so that a large number of them is seldom sorted.
    """

    def __init__(self, size: int, dtype: type[np.number] = np.float64) -> None:
        self._size = size
        self._scores: list[np.ndarray] = [np.empty(0, dtype)]
        self._rows: list[np.ndarray] = [np.empty(0, np.int64)]
        self._limit: np.number | None = None
        """The largest score that was kept the last time that there were too many."""
        self._num_held = 0

    def add(self, scores: np.ndarray, rows: np.ndarray) -> None:
        """Add scores: number[n] of rows: int64[n]."""
        if self._limit is not None:
            may_enter = scores <= self._limit
            scores, rows = scores[may_enter], rows[may_enter]
        if len(rows):
            self._scores.append(scores)
            self._rows.append(rows)
            self._num_held += len(rows)
        if len(self._rows) > MAX_PARTS:
            self._scores, self._rows = [np.concatenate(self._scores)], [np.concatenate(self._rows)]
        if self._num_held > 2 * self._size:
            self._limit = self.sorted()[0][-1]

    def sorted(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the scores and the rows, the smallest score first."""
        scores, rows = np.concatenate(self._scores), np.concatenate(self._rows)
        kept = np.lexsort((rows, scores))[: self._size]
        self._scores, self._rows, self._num_held = [scores[kept]], [rows[kept]], len(kept)
        return self._scores[0], self._rows[0]


class NearDuplicates:
    """Finds rows with the same caption and the same log-probability, to three digits.

    A model gives these to images that look the same to it: copies, other sizes or qualities of one image, or
    images next to each other in a film.
    """

    def __init__(self, max_keys: int = MAX_KEYS) -> None:
        self._keys = Smallest(max_keys, np.uint64)

    def add(self, captions: list[str], logprobs: np.ndarray, rows: np.ndarray) -> None:
        """Add captions with logprobs: float[n] and rows: int64[n]."""
        hashes = np.fromiter((zlib.crc32(text.encode()) for text in captions), np.uint64, len(captions))
        digits = np.round(logprobs * 1_000).astype(np.int64).astype(np.uint64) & np.uint64(0xFFFFFFFF)
        self._keys.add((hashes << np.uint64(32)) | digits, rows)

    def rows(self, number: int) -> list[int]:
        """Return at most `number` rows: two of each pair, pairs from all over the output."""
        keys, rows = self._keys.sorted()
        same = np.flatnonzero(keys[1:] == keys[:-1])
        firsts = same[np.insert(np.diff(same) > 1, 0, True)] if len(same) else same
        chosen = firsts[np.linspace(0, len(firsts) - 1, min(len(firsts), number // 2)).astype(int)]
        return [int(row) for first in chosen for row in rows[first : first + 2]]


class SampleChooser:
    """Call `add` once for every table, in the order of the output, then `chosen`."""

    def __init__(self) -> None:
        self._random = np.random.default_rng(0)
        self._groups = {name: Smallest(NUM_OTHERS) for name in GROUPS}
        self._groups["random"] = Smallest(NUM_RANDOM)
        self._duplicates = NearDuplicates()

    def add(self, rows: pa.Table, start: int) -> None:
        """Add a table whose first row has the number `start` in the whole output."""
        numbers = np.arange(start, start + len(rows))
        chance = self._random.random(len(rows))
        self._groups["random"].add(chance, numbers)
        self._add_where("failed", pc.not_equal(rows["status"], Status.OK.value), chance, numbers)
        self._add_where("flagged", pc.greater(pc.list_value_length(rows["flags"]), 0), chance, numbers)
        if "logprob" in rows.column_names:
            logprobs = _numpy(rows["logprob"])
            is_known = np.isfinite(logprobs)
            self._groups["unlikely"].add(logprobs[is_known], numbers[is_known])
            self._groups["longest"].add(-_numpy(rows["num_tokens"])[is_known], numbers[is_known])
            captions = rows["caption"].filter(pa.array(is_known)).fill_null("").to_pylist()
            self._duplicates.add(captions, logprobs[is_known], numbers[is_known])

    def chosen(self) -> dict[int, tuple[str, ...]]:
        """Return the numbers of the chosen rows with their groups, in the order of the groups."""
        by_group = {name: group.sorted()[1].tolist() for name, group in self._groups.items()}
        by_group["duplicates"] = self._duplicates.rows(NUM_OTHERS)
        found: dict[int, list[str]] = {}
        for name, rows in by_group.items():
            for row in rows:
                found.setdefault(row, []).append(name)
        return {row: tuple(names) for row, names in found.items()}

    def _add_where(
        self, name: str, is_wanted: pa.ChunkedArray, chance: np.ndarray, numbers: np.ndarray
    ) -> None:
        wanted = is_wanted.fill_null(False).to_numpy()
        self._groups[name].add(chance[wanted], numbers[wanted])


def _numpy(column: pa.ChunkedArray) -> np.ndarray:
    """Return a column of numbers as float64, with NaN for null."""
    return pc.cast(column, pa.float64()).fill_null(float("nan")).to_numpy()
