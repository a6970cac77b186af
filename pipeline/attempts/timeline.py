"""`Timeline`: the points of an attempt, however long it takes, in a bounded number."""

from __future__ import annotations

from pipeline.attempts.attempt import Point

MAX_POINTS = 240
STEP_S = 1.0


class Timeline:
    """Keeps a point per step. When it is full, it drops every second one and doubles the step.

    Points hold sums since the start, so a dropped point makes the line coarser but never wrong. The newest
    point is always kept.
    """

    def __init__(self, max_points: int = MAX_POINTS) -> None:
        self._max_points = max_points
        self._step_s = STEP_S
        self._points: list[Point] = []

    def add(self, point: Point) -> None:
        """Add a point, later than all before."""
        if len(self._points) > 1 and point.seconds - self._points[-2].seconds < self._step_s:
            self._points[-1] = point
        else:
            self._points.append(point)
        if len(self._points) > self._max_points:
            self._points = [*self._points[:-1:2], self._points[-1]]
            self._step_s *= 2

    @property
    def points(self) -> tuple[Point, ...]:
        return tuple(self._points)
