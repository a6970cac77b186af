"""`Rate`: how fast a run is."""

from __future__ import annotations

RATE_WINDOW_S = 20.0


class Rate:
    """Images per second, recently and on average; the time before the first image is not counted."""

    def __init__(self) -> None:
        self._points: list[tuple[float, int]] = []
        self._first: tuple[float, int] | None = None

    def add(self, num_rows: int, now: float) -> None:
        """Note how many rows are finished now.

        Args:
            num_rows: all rows finished so far.
            now: seconds of a monotonic clock.
        """
        if self._first is None:
            if not num_rows:
                return
            self._first = (now, num_rows)
        self._points.append((now, num_rows))
        while self._points[0][0] < now - RATE_WINDOW_S and len(self._points) > 2:
            self._points.pop(0)

    @property
    def recent(self) -> float:
        return _slope(self._points[0], self._points[-1]) if self._points else 0.0

    @property
    def mean(self) -> float:
        return _slope(self._first, self._points[-1]) if self._first and self._points else 0.0


def _slope(start: tuple[float, int], end: tuple[float, int]) -> float:
    seconds = end[0] - start[0]
    return (end[1] - start[1]) / seconds if seconds > 0 else 0.0
