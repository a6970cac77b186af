"""Figures as values: what a template needs to draw a histogram or a line in SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 480.0, 120.0
"""Units of the drawing; a page scales it."""
MAX_BINS = 24
"""More different values are grouped into bins of equal width."""


@dataclass(frozen=True)
class Bar:
    """One bar, which stands for the values from `low` to `high`, both included."""

    label: str
    count: int
    low: float
    high: float
    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Histogram:
    """A histogram. A bar filters the contact sheet by the value that its cards have for `field`."""

    title: str
    field: str | None
    bars: tuple[Bar, ...]
    first: str
    """Label below the first bar."""
    last: str
    total: int


def histogram(
    title: str, counts: Mapping[int, int] | Mapping[float, int], field: str | None = None
) -> Histogram | None:
    """Make a histogram of counted values, or None when there are none.

    Args:
        counts: how often each value occurs.
    """
    numbers_of: dict[float, int] = {value: number for value, number in counts.items() if math.isfinite(value)}
    values = sorted(numbers_of)
    if not values:
        return None
    groups = _groups(values)
    numbers = [sum(numbers_of[value] for value in group) for group in groups]
    step, largest = WIDTH / len(groups), max(numbers)
    bars = []
    for position, (group, number) in enumerate(zip(groups, numbers, strict=True)):
        height = max(1.0, HEIGHT * number / largest)
        label = shown(group[0]) if group[0] == group[-1] else f"{shown(group[0])} to {shown(group[-1])}"
        bars.append(
            Bar(
                label=label,
                count=number,
                low=group[0],
                high=group[-1],
                x=round(position * step, 2),
                y=round(HEIGHT - height, 2),
                width=round(max(1.0, step - 2), 2),
                height=round(height, 2),
            )
        )
    return Histogram(title, field, tuple(bars), shown(values[0]), shown(values[-1]), sum(numbers))


def _groups(values: Sequence[float]) -> list[list[float]]:
    """Return sorted values in at most `MAX_BINS` groups of equal width, none of them empty."""
    if len(values) <= MAX_BINS:
        return [[value] for value in values]
    width = (values[-1] - values[0]) / MAX_BINS
    groups: dict[int, list[float]] = {}
    for value in values:
        groups.setdefault(min(MAX_BINS - 1, int((value - values[0]) / width)), []).append(value)
    return [groups[index] for index in sorted(groups)]


@dataclass(frozen=True)
class Line:
    """A line over time, from the left to the right edge, with its largest value at the top."""

    points: str
    """For the attribute of a polyline."""
    seconds: float
    largest: float
    joints: tuple[float, ...]
    """Where one attempt ends and the next begins."""


def line(series: Sequence[Sequence[tuple[float, float]]]) -> Line | None:
    """Draw values over time, one series after the other.

    Args:
        series: of each the (seconds it lasts, value) of each piece, in order.
    """
    pieces = [piece for one in series for piece in one]
    seconds, largest = sum(s for s, _ in pieces), max((value for _, value in pieces), default=0.0)
    if not seconds or not largest:
        return None
    now, points, joints = 0.0, [], []
    for one in series:
        if now and one:
            joints.append(round(now / seconds * WIDTH, 2))
        for lasts, value in one:
            y = round(HEIGHT * (1 - value / largest), 2)
            points += [f"{now / seconds * WIDTH:.2f},{y}", f"{(now + lasts) / seconds * WIDTH:.2f},{y}"]
            now += lasts
    return Line(" ".join(points), seconds, largest, tuple(joints))


def shown(value: float) -> str:
    """Return a value as a short text: 12, 1,024, -0.53."""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.2f}"
