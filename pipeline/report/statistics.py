"""What the rows of an output say, counted table by table in memory that does not grow with their number."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from blip2_actor import Status

COUNTED = ("key", "shard", "caption", "num_tokens", "flags", "status", "error", "width", "height")
"""The columns that are read; those that an output does not have are not counted."""
MAX_TEXTS = 50_000
MAX_REASONS = 1_000
MAX_REASON_CHARS = 200
MAX_EXAMPLES = 3
OTHER = "other reasons"
_NUMBER = re.compile(r"\d+")


class Frequent:
    """The most frequent of any number of texts."""

    def __init__(self, most: int = MAX_TEXTS) -> None:
        self._counts: Counter[str] = Counter()
        self._most = most
        self.is_exact = True
        """False once rare texts were forgotten: counts are then lower bounds."""

    def add(self, text: str, count: int) -> None:
        self._counts[text] += count
        if len(self._counts) > 2 * self._most:
            self._counts = Counter(dict(self._counts.most_common(self._most)))
            self.is_exact = False

    def __len__(self) -> int:
        return len(self._counts)

    def top(self, number: int) -> list[tuple[str, int]]:
        """Texts that came more than once, the most frequent first."""
        return [(text, count) for text, count in self._counts.most_common(number) if count > 1]


@dataclass
class Kind:
    """Rows that have something in common, and some of their keys."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, count: int, example: str) -> None:
        self.count += count
        if len(self.examples) < MAX_EXAMPLES:
            self.examples.append(example)


class Statistics:
    """Give it every table once, then read what it counted."""

    def __init__(self) -> None:
        self.num_rows = 0
        self.by_status: Counter[str] = Counter()
        self.num_tokens: Counter[int] = Counter()
        """Rows by the length of their caption."""
        self.long_side_px: Counter[int] = Counter()
        """Images by their longer side, rounded up to a power of two."""
        self.captions = Frequent()
        self.flags: dict[str, Kind] = {}
        self.reasons: dict[tuple[str, str], Kind] = {}
        """Failed rows by status and error, in which every number is written N."""

    def add(self, rows: pa.Table) -> None:
        self.num_rows += len(rows)
        self.by_status.update(dict(_counts(rows["status"])))
        self._add_failures(rows)
        self._add_flags(rows)
        names = rows.column_names
        if "caption" in names:
            self.num_tokens.update(dict(_counts(rows["num_tokens"])))
            for text, count in _counts(rows["caption"]):
                self.captions.add(text, count)
        sides = pc.max_element_wise(rows["width"], rows["height"]).drop_null().to_numpy()
        exponents, counts = np.unique(np.ceil(np.log2(np.maximum(sides, 1))), return_counts=True)
        for exponent, count in zip(exponents, counts, strict=True):
            self.long_side_px[2 ** int(exponent)] += int(count)

    def _add_failures(self, rows: pa.Table) -> None:
        failed = rows.filter(pc.not_equal(rows["status"], Status.OK.value))
        if not len(failed):
            return
        texts = pc.binary_join_element_wise(failed["status"], failed["error"].fill_null(""), "\0")
        for text, count, first in _firsts(texts):
            status, _, error = text.partition("\0")
            reason = status, _NUMBER.sub("N", error)[:MAX_REASON_CHARS]
            if reason not in self.reasons and len(self.reasons) >= MAX_REASONS:
                reason = status, OTHER
            self.reasons.setdefault(reason, Kind()).add(count, failed["key"][first].as_py())

    def _add_flags(self, rows: pa.Table) -> None:
        flagged = rows.filter(pc.greater(pc.list_value_length(rows["flags"]), 0))
        for position, flags in enumerate(flagged["flags"]):
            for flag in flags.as_py():
                self.flags.setdefault(flag, Kind()).add(1, flagged["key"][position].as_py())


def _counts(column: pa.ChunkedArray) -> Iterator[tuple[Any, int]]:
    for entry in pc.value_counts(column.drop_null()).to_pylist():
        yield entry["values"], entry["counts"]


def _firsts(column: pa.ChunkedArray) -> Iterator[tuple[str, int, int]]:
    """Each text, how often it comes, and where first."""
    encoded = column.combine_chunks().dictionary_encode()
    codes, firsts, counts = np.unique(encoded.indices.to_numpy(), return_index=True, return_counts=True)
    for code, first, count in zip(codes, firsts, counts, strict=True):
        yield encoded.dictionary[int(code)].as_py(), int(count), int(first)
