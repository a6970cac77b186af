"""Statistics of the rows of an output, counted table by table.

Memory is bounded: however many rows there are, only the most frequent captions, a maximum number of
failure reasons and a few example keys of each are kept.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from blip2_actor import Status

COUNTED_COLUMNS = (
    "key",
    "caption",
    "logprob",
    "num_tokens",
    "flags",
    "status",
    "error",
    "width",
    "height",
)
"""The columns that are read, besides those of answers and scores. A column that is missing is not counted."""
MAX_TEXTS = 50_000
MAX_REASONS = 1_000
MAX_REASON_CHARS = 200
MAX_EXAMPLES = 3
MAX_ANSWERS = 1_000
"""Different answers to one prompt that are counted."""
OPENING = r"^\s*(?P<opening>\S+(?:\s+\S+){0,2})"
"""The first three words of a caption."""
LOGPROB_DIGITS, SCORE_DIGITS = 1, 2
MAX_SCORE = 100.0
"""Scores are counted as if none were farther from 0, so that their number is bounded."""
OTHER_REASONS = "other reasons"
"""Collects the failed rows once there are `MAX_REASONS` reasons."""
_NUMBER = re.compile(r"(?<!JPEG )(?<!status )(?<!blip)(?<!\d)\d+")
"""A number that differs from row to row. JPEG 2000 and blip2 are names, a web server's status is a reason."""


class FrequentTexts:
    """Counts texts and keeps the most frequent ones.

    Once more than twice `max_texts` are known, all but the `max_texts` most frequent are forgotten.
    """

    def __init__(self, max_texts: int = MAX_TEXTS) -> None:
        self._counts: Counter[str] = Counter()
        self._max_texts = max_texts
        self.is_exact = True
        """False once rare texts have been forgotten: the counts are then lower bounds."""

    def add(self, counts: Iterable[tuple[str, int]]) -> None:
        """Add texts and how often each occurs."""
        for text, count in counts:
            self._counts[text] += count
            if len(self._counts) > 2 * self._max_texts:
                self._counts = Counter(dict(self._counts.most_common(self._max_texts)))
                self.is_exact = False

    def __len__(self) -> int:
        return len(self._counts)

    def top(self, max_texts: int) -> list[tuple[str, int]]:
        """Return the texts that occur more than once with their counts, the most frequent first."""
        return [(text, count) for text, count in self._counts.most_common(max_texts) if count > 1]


@dataclass
class CountWithExamples:
    """The number of rows that have a property, and the keys of some of them."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, count: int, example: str) -> None:
        self.count += count
        if len(self.examples) < MAX_EXAMPLES:
            self.examples.append(example)


class Statistics:
    """Counts of an output's rows. Call `add` once for every table, then read the attributes."""

    def __init__(self, answers: Iterable[str] = (), scores: Iterable[str] = ()) -> None:
        """Count nothing yet.

        Args:
            answers: text columns whose values are counted.
            scores: columns of numbers that become histograms.
        """
        self.num_rows = 0
        self.by_status: Counter[str] = Counter()
        self.num_tokens: Counter[int] = Counter()
        """Number of rows by the length of their caption in tokens."""
        self.long_side_px: Counter[int] = Counter()
        """Number of images by their longer side, rounded up to a power of two."""
        self.logprobs: Counter[float] = Counter()
        """Number of rows by the log-probability of their caption, to one digit."""
        self.captions = FrequentTexts()
        self.openings = FrequentTexts()
        """The first three words of captions."""
        self.answers = {name: FrequentTexts(MAX_ANSWERS) for name in answers}
        self.scores: dict[str, Counter[float]] = {name: Counter() for name in scores}
        """Number of rows by score, to two digits."""
        self.flags: dict[str, CountWithExamples] = {}
        self.reasons: dict[tuple[str, str], CountWithExamples] = {}
        """Failed rows by status and error. Every number in an error is replaced by N."""

    def add(self, rows: pa.Table) -> None:
        """Count a table that has the `COUNTED_COLUMNS` of its output."""
        self.num_rows += len(rows)
        self.by_status.update(dict(_counts(rows["status"])))
        self._add_failures(rows)
        self._add_flags(rows)
        if "caption" in rows.column_names:
            self.num_tokens.update(dict(_counts(rows["num_tokens"])))
            self.logprobs.update(_rounded(rows["logprob"], LOGPROB_DIGITS))
            self.captions.add(_counts(rows["caption"]))
            openings = pc.extract_regex(rows["caption"], OPENING)
            self.openings.add(_counts(pc.struct_field(openings, "opening")))
        for name, texts in self.answers.items():
            if name in rows.column_names:
                texts.add(_counts(rows[name]))
        for name, counts in self.scores.items():
            if name in rows.column_names:
                counts.update(_rounded(rows[name], SCORE_DIGITS))
        sides = pc.max_element_wise(rows["width"], rows["height"]).drop_null().to_numpy()
        self.long_side_px.update(size_class(sides).tolist())

    def most_frequent_reasons(self) -> list[tuple[tuple[str, str], CountWithExamples]]:
        """Return `reasons` as a list, the one with the most rows first."""
        return sorted(self.reasons.items(), key=lambda item: -item[1].count)

    def _add_failures(self, rows: pa.Table) -> None:
        failed = rows.filter(pc.not_equal(rows["status"], Status.OK.value))
        # The groups are in the order of their first rows.
        groups = failed.group_by(["status", "error"], use_threads=False)
        for group in groups.aggregate([("key", "first"), ("key", "count")]).to_pylist():
            reason = group["status"], _NUMBER.sub("N", group["error"] or "")[:MAX_REASON_CHARS]
            if reason not in self.reasons and len(self.reasons) >= MAX_REASONS:
                reason = group["status"], OTHER_REASONS
            self.reasons.setdefault(reason, CountWithExamples()).add(group["key_count"], group["key_first"])

    def _add_flags(self, rows: pa.Table) -> None:
        flagged = rows.filter(pc.greater(pc.list_value_length(rows["flags"]), 0))
        for row in flagged.select(["key", "flags"]).to_pylist():
            for flag in row["flags"]:
                self.flags.setdefault(flag, CountWithExamples()).add(1, row["key"])


def size_class(side_px: np.ndarray) -> np.ndarray:
    """Return sides rounded up to a power of two: int64[n] of pixels to int64[n]."""
    return 2 ** np.ceil(np.log2(np.maximum(side_px, 1))).astype(np.int64)


def binned(numbers: np.ndarray, digits: int) -> np.ndarray:
    """Return finite numbers as histograms count them: float64[...] to float64[...]."""
    return np.round(np.clip(numbers, -MAX_SCORE, MAX_SCORE), digits) + 0.0


def _rounded(column: pa.ChunkedArray, digits: int) -> list[float]:
    """Return the finite numbers of a column, rounded."""
    numbers = pc.cast(column.drop_null(), pa.float64()).to_numpy()
    return binned(numbers[np.isfinite(numbers)], digits).tolist()


def _counts(column: pa.ChunkedArray) -> Iterator[tuple[Any, int]]:
    """Yield each value of a column that is not null, and how often it occurs."""
    for entry in pc.value_counts(column.drop_null()).to_pylist():
        yield entry["values"], entry["counts"]
