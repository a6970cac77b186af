"""RowSet decides what is read again after a death: a wrong union loses rows or captions them twice."""

from hypothesis import given
from hypothesis import strategies as st

from pipeline.rowset import RowSet, ranges_of

RANGES = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=25)


def rows_of(ranges) -> set[int]:
    return {row for start, stop in ranges for row in range(start, stop)}


@given(RANGES)
def test_union_equals_a_plain_set_and_stays_disjoint(ranges):
    got = RowSet(ranges)
    assert rows_of(got) == rows_of(ranges)
    assert len(got) == len(rows_of(ranges))
    bounds = [bound for pair in got for bound in pair]
    assert bounds == sorted(set(bounds)), "ranges touch or overlap"
    assert all((row in got) == (row in rows_of(ranges)) for row in range(62))


@given(RANGES, st.integers(0, 70))
def test_missing_is_the_complement(ranges, num_rows):
    rows = RowSet(ranges)
    missing = list(rows.missing(num_rows))
    assert rows_of(missing) == set(range(num_rows)) - rows_of(ranges)
    assert rows.covers(num_rows) == (not missing)


def test_missing_of_a_shard_whose_end_is_unknown_stays_open():
    assert list(RowSet([(2, 4)]).missing(None)) == [(0, 2), (4, None)]
    assert list(RowSet().missing(None)) == [(0, None)]


@given(st.lists(st.integers(0, 50)))
def test_sorted_rows_become_ranges(rows):
    ranges = list(ranges_of(sorted(rows)))
    assert rows_of(ranges) == set(rows)
    assert len(ranges) == len(list(RowSet(ranges)))


def test_of_rows_takes_any_order():
    assert list(RowSet(ranges_of([5, 1, 2, 0, 5]))) == [(0, 3), (5, 6)]
