"""Which rows the contact sheet shows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.report.samples import (
    MAX_PARTS,
    NUM_OTHERS,
    NUM_RANDOM,
    NearDuplicates,
    SampleChooser,
    Smallest,
)
from pipeline.schema import output_schema


def table(numbers: range) -> pa.Table:
    """Rows whose log-probability falls with their number; 1 in 50 has failed, and 1 in 40 is flagged."""
    rows: list[dict[str, Any]] = []
    for n in numbers:
        row: dict[str, Any] = {"key": str(n), "shard": "s", "row": n, "flags": [], "status": "failed"}
        if n % 50:
            row |= {"status": "ok", "caption": f"caption {n}", "logprob": -n / 7, "num_tokens": n % 97}
            row |= {"flags": ["looping"] if n % 40 == 1 else []}
        rows.append(row)
    return pa.Table.from_pylist(rows, schema=output_schema())


def chosen(step: int) -> dict[int, tuple[str, ...]]:
    chooser = SampleChooser()
    for start in range(0, 4_000, step):
        chooser.add(table(range(start, start + step)), start)
    return chooser.chosen()


def test_each_group_has_its_rows():
    groups: dict[str, set[int]] = {}
    for row, names in chosen(500).items():
        for name in names:
            groups.setdefault(name, set()).add(row)
    assert len(groups["random"]) == NUM_RANDOM and min(groups["random"]) < 400 < 3_600 < max(groups["random"])
    assert groups["unlikely"] == set([n for n in range(4_000) if n % 50][-NUM_OTHERS:])
    assert len(groups["longest"]) == NUM_OTHERS and all(n % 97 > 94 for n in groups["longest"])
    assert len(groups["failed"]) == NUM_OTHERS and all(n % 50 == 0 for n in groups["failed"])
    assert len(groups["flagged"]) == NUM_OTHERS and all(n % 40 == 1 for n in groups["flagged"])
    assert "duplicates" not in groups


def test_the_choice_does_not_change_from_report_to_report():
    assert chosen(500) == chosen(500)


def num_held(smallest: Smallest) -> int:
    rows, scores = sum(map(len, smallest._rows)), sum(map(len, smallest._scores))
    assert rows == scores
    return rows


def test_smallest_keeps_only_what_it_needs():
    smallest = Smallest(3)
    for start in range(0, 100, 10):
        smallest.add(np.arange(start, start + 10)[::-1].astype(float), np.arange(start, start + 10))
        assert num_held(smallest) <= 6
    assert smallest.sorted()[1].tolist() == [9, 8, 7]


def test_a_score_may_still_replace_the_largest_that_is_kept():
    smallest = Smallest(2)
    smallest.add(np.array([1.0, 9.0, 10.0, 11.0, 12.0]), np.arange(5))
    smallest.add(np.array([5.0]), np.array([5]))
    assert smallest.sorted()[1].tolist() == [0, 5]


def test_the_smallest_are_the_same_in_parts_of_any_size():
    """Which of several equal scores were kept used to depend on the sizes of the tables."""
    scores = np.random.default_rng(1).integers(0, 40, 2_000)
    expected = np.lexsort((np.arange(2_000), scores))[:70]
    for step in (1, 7, 100, 2_000):
        smallest = Smallest(70, np.uint64)
        for start in range(0, 2_000, step):
            rows = np.arange(start, min(start + step, 2_000))
            smallest.add(scores[rows].astype(np.uint64), rows)
        assert smallest.sorted()[1].tolist() == expected.tolist()


def test_the_smallest_of_many_small_parts_are_held_in_few():
    """A million rows that came one by one used to take 300 MB."""
    smallest = Smallest(3 * MAX_PARTS)
    for n in range(2 * MAX_PARTS):
        smallest.add(np.array([-float(n)]), np.array([n]))
        assert len(smallest._rows) <= MAX_PARTS
    assert smallest.sorted()[1].tolist() == list(range(2 * MAX_PARTS))[::-1]


def test_near_duplicates_are_found_in_bounded_memory():
    found = NearDuplicates(max_keys=1_000)
    for start in range(0, 20_000, 100):
        numbers = np.arange(start, start + 100)
        # Neighbors have the same caption; only the log-probabilities of the first 50 pairs of 100 agree.
        logprobs = np.where((numbers // 2) % 100 < 50, -1.0, -numbers / 3)
        found.add([f"caption {n // 2}" for n in numbers], logprobs, numbers)
        assert num_held(found._keys) <= 2_000
    rows = found.rows(10)
    assert len(rows) == 10
    assert all(b == a + 1 and (a // 2) % 100 < 50 for a, b in zip(rows[::2], rows[1::2], strict=True))
    assert NearDuplicates().rows(10) == []


def test_of_many_copies_two_are_shown():
    found = NearDuplicates()
    found.add(["a", "a", "b", "a", "a", "b", "c"], np.full(7, -1.0), np.arange(7))
    rows = found.rows(10)
    assert sorted([rows[:2], rows[2:]]) == [[0, 1], [2, 5]]
