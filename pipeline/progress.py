"""Progress for people: one line that rewrites itself in a terminal, a plain line now and then in a log."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TextIO

LIVE_EVERY_S = 0.5
LOG_EVERY_S = 10.0
RATE_WINDOW_S = 20.0


@dataclass(frozen=True, kw_only=True)
class ProgressSnapshot:
    """How far a run is at one moment; the heartbeat stores it by its field names, for `status`."""

    num_rows: int
    """Rows finished in this session."""
    num_failed: int
    images_per_s: float
    """Over the last seconds."""
    shards_done: int
    num_shards: int
    left_s: float | None
    """Estimated seconds to go, when that is known."""
    busy: Mapping[str, float] = field(default_factory=dict)
    """Busy fraction by stage."""
    trouble: str | None = None
    """What the run waits for, when a store fails."""

    def line(self) -> str:
        trouble = [self.trouble] if self.trouble else []
        if not self.num_rows:
            return " · ".join(["starting", f"shards {self.shards_done:,}/{self.num_shards:,}", *trouble])
        parts = [
            count(self.num_rows, "image"),
            f"{self.images_per_s:,.1f}/s",
            f"{self.num_failed:,} failed",
            f"shards {self.shards_done:,}/{self.num_shards:,}",
            f"ETA {duration(self.left_s)}",
        ]
        if trouble:
            return " · ".join([*trouble, *parts])
        if self.busy:
            parts.append("busy " + ", ".join(f"{stage} {part:.0%}" for stage, part in self.busy.items()))
        return " · ".join(parts)


def count(number: int, noun: str) -> str:
    """Return a number with its noun: 1 shard, 2,000 shards."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def duration(seconds: float | None) -> str:
    """Return a duration in at most two units: 3 d 4 h, 5 min 6 s."""
    if seconds is None:
        return "unknown"
    seconds = int(seconds + 0.5)
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    for (big, big_s), (small, small_s) in pairwise(units):
        if seconds >= big_s:
            rest = seconds % big_s // small_s
            return f"{seconds // big_s} {big} {rest} {small}" if rest else f"{seconds // big_s} {big}"
    return f"{seconds} s"


def format_bytes(num_bytes: float) -> str:
    """Format a number of bytes with three digits, in powers of 1000."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "bytes" else f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.3g} TB" if num_bytes < 1000 else f"{num_bytes:,.0f} TB"


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


def write(stream: TextIO | None, text: str) -> bool:
    """Write a text for people, whatever the stream can take; return whether anybody may read it.

    Characters that its encoding lacks are replaced. A stream whose reader has gone (`| head`, a closed
    terminal) takes nothing from then on: what a job makes is in its files, and so the job goes on.
    """
    if stream is None:  # Python was started without it
        return False
    try:
        try:
            stream.write(text)
        except UnicodeEncodeError:
            plain = text.replace("·", "|").replace("…", "...")
            stream.write(plain.encode("ascii", "backslashreplace").decode())
        stream.flush()
    except OSError:
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, stream.fileno())
        os.close(nothing)
        return False
    return True


class Console:
    """What a command prints: sentences, and progress between them."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream: TextIO | None = stream or sys.stdout
        self._is_live = self._stream is not None and self._stream.isatty()
        self._last = 0.0
        self._width = 0

    def say(self, text: str = "") -> None:
        """Print a line; a progress line in a terminal makes room for it."""
        self._clear()
        write(self._stream, text + "\n")

    def wants_progress(self) -> bool:
        """Return whether the last progress is old enough to be shown again."""
        return time.monotonic() - self._last >= (LIVE_EVERY_S if self._is_live else LOG_EVERY_S)

    def show(self, snapshot: ProgressSnapshot) -> None:
        """Show progress: in place of the last one in a terminal, as a new line elsewhere."""
        self._last = time.monotonic()
        if not self._is_live:
            self.say(snapshot.line())
            return
        line = snapshot.line()
        write(self._stream, "\r" + line.ljust(self._width))
        self._width = len(line)

    def _clear(self) -> None:
        if self._width:
            write(self._stream, "\r" + " " * self._width + "\r")
            self._width = 0
