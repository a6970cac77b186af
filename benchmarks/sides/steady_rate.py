"""The rate of a run in its steady state, without its start-up and its tail."""

from __future__ import annotations

from collections.abc import Sequence

START, END = 0.15, 0.9
"""The steady state lies between these fractions of all rows."""


def steady_rate(progress: Sequence[tuple[float, int]]) -> float:
    """Return rows per second in the steady state.

    Args:
        progress: pairs of a time in seconds and the number of rows that were finished by then, in order.

    Returns:
        The rate, or 0 if there are too few pairs.
    """
    total = progress[-1][1]
    first = next(point for point in progress if point[1] >= START * total)
    last = [point for point in progress if point[1] <= END * total or point is first][-1]
    return (last[1] - first[1]) / (last[0] - first[0]) if last is not first else 0.0
