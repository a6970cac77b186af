"""`Comparison`: what two runs say of the same images, counted pair by pair in bounded memory."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from blip2_actor import Status
from pipeline.compare.edit_distance import edit_distance
from pipeline.compare.join import Pair
from pipeline.compare.metrics import Score, compare_scores

NUM_LARGEST = 150
NUM_STATUS_CHANGES = 50
"""Pairs that the page shows one by one."""
MAX_SCORED = 20_000
"""Maximum number of pairs with a reference that are scored; they are chosen at random from more."""
LOGPROB_DIGITS = 1


@dataclass(frozen=True)
class Change:
    """A pair whose captions or statuses differ."""

    pair: Pair
    distance: int
    """Edit distance of the captions in words; 0 if one of the rows has failed."""


@dataclass
class Comparison:
    """Call `add` for each pair, then read the rest. A and B are the first and the second run."""

    reference: str | None = None
    num_pairs: int = 0
    num_captioned: int = 0
    """Pairs whose rows are both ok."""
    num_changed: int = 0
    """Those of them with different captions."""
    distances: Counter[int] = field(default_factory=Counter)
    """Number of captioned pairs by edit distance in words."""
    logprobs: Counter[float] = field(default_factory=Counter)
    """Number of captioned pairs by the change of the log-probability, to one digit."""
    logprob_sum: float = 0.0
    statuses: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Number of pairs by the statuses in A and in B."""
    num_references: int = 0
    unmatched: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._largest: list[tuple[int, float, int, Change]] = []
        self._status_changes: list[Change] = []
        self._scored: list[tuple[str, str, Sequence[str]]] = []
        self._random = np.random.default_rng(0)

    def add(self, pair: Pair) -> None:
        """Count a pair."""
        before, after = pair.before, pair.after
        self.num_pairs += 1
        self.statuses[before["status"], after["status"]] += 1
        if before["status"] != after["status"] and len(self._status_changes) < NUM_STATUS_CHANGES:
            self._status_changes.append(Change(pair, 0))
        if not before["status"] == after["status"] == Status.OK:
            return
        self.num_captioned += 1
        a, b = before["caption"] or "", after["caption"] or ""
        distance = edit_distance(a.split(), b.split()) if a != b else 0
        self.num_changed += a != b
        self.distances[distance] += 1
        change = pair.logprob_change
        if change is not None:
            self.logprobs[round(change, LOGPROB_DIGITS) + 0.0] += 1
            self.logprob_sum += change
        if a != b:
            self._add_largest(Change(pair, distance))
        if self.reference is not None:
            self._add_reference(a, b, references(pair, self.reference))

    @property
    def changed_fraction(self) -> float:
        return self.num_changed / self.num_captioned if self.num_captioned else 0.0

    @property
    def mean_distance(self) -> float:
        """Mean edit distance in words over all captioned pairs."""
        total = sum(distance * number for distance, number in self.distances.items())
        return total / self.num_captioned if self.num_captioned else 0.0

    @property
    def mean_logprob_change(self) -> float | None:
        number = self.logprobs.total()
        return self.logprob_sum / number if number else None

    @property
    def status_changes(self) -> list[tuple[str, str, int]]:
        """Return statuses in A and in B with the number of pairs, the most frequent first."""
        return [(a, b, number) for (a, b), number in self.statuses.most_common() if a != b]

    @property
    def num_scored(self) -> int:
        """Pairs on which the metrics are computed."""
        return len(self._scored)

    def largest(self) -> list[Change]:
        """Return the changes that the page shows: of captions, the largest first, then of statuses."""
        return [entry[3] for entry in sorted(self._largest, reverse=True)] + self._status_changes

    def scores(self) -> dict[str, Score]:
        """Return the metrics of both runs, or nothing if no pair has a reference."""
        if not self._scored:
            return {}
        before, after, targets = zip(*self._scored, strict=True)
        return compare_scores(before, after, targets)

    def _add_largest(self, change: Change) -> None:
        # The number makes every entry comparable, and the first of equal changes stays.
        entry = (change.distance, abs(change.pair.logprob_change or 0.0), -self.num_pairs, change)
        if len(self._largest) < NUM_LARGEST:
            heapq.heappush(self._largest, entry)
        else:
            heapq.heappushpop(self._largest, entry)

    def _add_reference(self, before: str, after: str, targets: Sequence[str]) -> None:
        """Keep a pair for the metrics: all of the first `MAX_SCORED`, then each with a falling chance."""
        if not targets:
            return
        self.num_references += 1
        if len(self._scored) < MAX_SCORED:
            self._scored.append((before, after, targets))
        elif (place := int(self._random.integers(self.num_references))) < MAX_SCORED:
            self._scored[place] = (before, after, targets)


def compare(pairs: Iterable[Pair], reference: str | None = None) -> Comparison:
    """Count pairs."""
    comparison = Comparison(reference)
    for pair in pairs:
        comparison.add(pair)
    return comparison


def references(pair: Pair, column: str) -> list[str]:
    """Return the right captions of a pair, from the first run that has the column."""
    row: Mapping[str, Any] = pair.before if column in pair.before else pair.after
    value = row.get(column)
    found = value if isinstance(value, list) else [value]
    return [text for text in found if isinstance(text, str) and text.strip()]
