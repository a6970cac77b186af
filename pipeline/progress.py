"""Progress for people: one line that rewrites itself in a terminal, a plain line now and then in a log."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TextIO

LIVE_EVERY_S = 0.5
LOG_EVERY_S = 10.0
RATE_WINDOW_S = 20.0
SEPARATOR = " · "
MOST_IMPORTANT_FIRST = ("trouble", "images", "eta", "failed", "rate", "shards", "busy")
"""Which parts of the line a narrow terminal shows."""


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

    def line(self, max_chars: int | None = None) -> str:
        """Return the progress on one line.

        Args:
            max_chars: leave out what does not fit, the least important first; a line that still does not fit
                is cut. None leaves out nothing.
        """
        parts = self._parts()
        if max_chars is None:
            return SEPARATOR.join(parts.values())
        if "trouble" in parts:
            parts["trouble"] = cut(parts["trouble"], max_chars)
        kept: list[str] = []
        for name in [name for name in MOST_IMPORTANT_FIRST if name in parts]:
            kept.append(name)
            if len(SEPARATOR.join(parts[one] for one in kept)) > max_chars:
                kept.pop()
                break
        line = SEPARATOR.join(text for name, text in parts.items() if name in kept)
        return line or cut(parts["images"], max_chars)

    def _parts(self) -> dict[str, str]:
        """Return the parts of the line in their order."""
        parts = {"trouble": self.trouble} if self.trouble and self.num_rows else {}
        shards = f"shards {self.shards_done:,}/{self.num_shards:,}"
        if not self.num_rows:
            parts |= {"images": "starting", "shards": shards}
            return parts | ({"trouble": self.trouble} if self.trouble else {})
        parts |= {
            "images": count(self.num_rows, "image"),
            "rate": f"{self.images_per_s:,.1f}/s",
            "failed": f"{self.num_failed:,} failed",
            "shards": shards,
            "eta": f"ETA {duration(self.left_s)}",
        }
        if self.busy and not self.trouble:
            parts["busy"] = "busy " + ", ".join(f"{stage} {part:.0%}" for stage, part in self.busy.items())
        return parts


def cut(text: str, max_chars: int) -> str:
    """Return a text that is at most so long, with an ellipsis if it was longer."""
    return text if len(text) <= max_chars else text[: max(0, max_chars - 1)] + "…"


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
        max_chars = _columns(self._stream) - 1  # some terminals wrap when the last column is written
        line = snapshot.line(max_chars)
        write(self._stream, "\r" + line.ljust(min(self._width, max_chars)))
        self._width = len(line)

    def _clear(self) -> None:
        if self._width:
            write(self._stream, "\r" + " " * min(self._width, _columns(self._stream) - 1) + "\r")
            self._width = 0


def _columns(stream: TextIO | None) -> int:
    """Return the width of a terminal as it is now."""
    try:
        columns = 0 if stream is None else os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):  # not a terminal of the system
        columns = 0
    return columns or shutil.get_terminal_size().columns
