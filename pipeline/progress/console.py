"""`Console`: what a command says to the person, or the program, that has started it."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal, TextIO

from pipeline.progress.snapshot import ProgressSnapshot
from pipeline.progress.wording import duration, escaped
from pipeline.progress.writing import DUMB, write

if TYPE_CHECKING:
    from pipeline.finding import Finding
    from pipeline.progress.live_area import LiveArea

Style = Literal["text", "quiet", "json"]
LIVE_EVERY_S = 0.5
LOG_EVERY_S = 10.0
"""Seconds between two lines about what the job waits for, and between two lines of JSON."""
LINE_EVERY_S = 60.0
"""Seconds between two lines of progress where there is no terminal."""
YELLOW, RED = "\x1b[33m", "\x1b[31m"
_RESET = "\x1b[0m"

_style: Style = "text"
_may_be_live = True


def choose_style(style: Style, may_be_live: bool = True) -> None:
    """Choose how every console of this process speaks, as `--quiet` and `--json` ask for it.

    Args:
        style: text for people; quiet leaves out notes and progress; json is one object per line.
        may_be_live: whether a terminal may have lines that change; log messages would tear them.
    """
    global _style, _may_be_live
    _style, _may_be_live = style, may_be_live


class Console:
    """Says results, notes, warnings and progress.

    In the style "json" each of them is one line: an object with `event`, `time` and what belongs to it.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream: TextIO | None = stream or sys.stdout
        is_terminal = self._stream is not None and self._stream.isatty()
        is_terminal = is_terminal and os.environ.get("TERM") not in DUMB
        self._is_terminal = is_terminal
        self._is_live = is_terminal and _style == "text" and _may_be_live
        self._has_color = is_terminal and not os.environ.get("NO_COLOR")
        self._area: LiveArea | None = None
        self._last = 0.0 if self._is_live else time.monotonic()
        self._phase: str | None = None
        self._phase_began = 0.0
        self._warnings: dict[str, int] = {}
        self._keep: Callable[[str, str], Any] | None = None

    def keep(self, take: Callable[[str, str], Any]) -> None:
        """Also hand each line from now on to a function, including those that `--quiet` leaves out.

        Args:
            take: takes the kind of the line (note, warning, failure, result) and its text.
        """
        self._keep = take

    @property
    def is_json(self) -> bool:
        return _style == "json"

    def say(self, text: str) -> None:
        """Print a note; `--quiet` leaves it out."""
        self._print("note", text)

    def clear(self) -> None:
        """Empty the screen of a terminal; elsewhere, leave an empty line."""
        if not self.is_json:
            write(self._stream, "\x1b[2J\x1b[H" if self._is_terminal else "\n")

    def result(self, text: str) -> None:
        """Print a line of the command's result."""
        self._print("result", text)

    def warn(self, text: str) -> None:
        """Print what a person should look at, even with `--quiet`."""
        self._print("warning", text, YELLOW)

    def fail(self, text: str) -> None:
        """Print what has failed, even with `--quiet`."""
        self._print("failure", text, RED)

    def count_warnings(self, warnings: Mapping[str, int]) -> None:
        """Print each warning of a worker once.

        Args:
            warnings: how often each was given since the start.
        """
        for text in warnings:
            if text not in self._warnings:
                self.warn(f"warning of a worker: {text}")
        self._warnings |= warnings

    def say_repeated(self) -> None:
        """Print how often each repeated warning was given."""
        for text, number in self._warnings.items():
            if number > 1:
                self.warn(f"warning of a worker: {text} ({number:,} times)")

    def stream_log(self, text: str) -> None:
        """Print a piece of the log of another process, as it is."""
        if self.is_json:
            for line in text.splitlines():
                self.event("log", text=line)
        else:
            write(self._stream, text)

    def error(self, text: str) -> None:
        """Print the sentence that ends a command, in every style; people read it on standard error."""
        write(self._stream, self._shown(text, RED) + "\n")

    def finding(self, finding: Finding) -> None:
        """Print what a check has found, without secrets. What is ok is a note."""
        from blip2_actor.flags import hide_secrets  # as in `_shown`

        say = {"warn": self.warn, "fail": self.fail}.get(finding.verdict, self.say)
        for line in finding.lines():
            say(hide_secrets(line))

    def event(self, name: str, /, **values: Any) -> None:
        """Print an object for programs; people do not see it."""
        if self.is_json:
            now = datetime.now(UTC).isoformat(timespec="milliseconds")
            write(self._stream, json.dumps({"event": name, "time": now, **values}) + "\n")

    @contextmanager
    def area(self) -> Iterator[None]:
        """Keep the last lines of a terminal for progress inside the block; they are gone at its end."""
        if not self._is_live:
            yield
            return
        from pipeline.progress.live_area import LiveArea  # imports rich, only needed here

        assert self._stream is not None
        self._area = LiveArea(self._stream)
        try:
            yield
        finally:
            area, self._area, self._phase = self._area, None, None
            area.close()

    def phase(self, name: str | None) -> None:
        """Begin a phase of the start, and say how long the one before took; None only ends that one."""
        if name == self._phase:
            return
        now = time.monotonic()
        if self._phase is not None:
            seconds = now - self._phase_began
            if self.is_json:
                self.event("phase", name=self._phase, seconds=round(seconds, 3))
            else:
                self.say(f"{self._phase}: {duration(seconds)}")
        self._phase, self._phase_began = name, now
        if self._area is not None:
            self._area.begin_phase(name)

    def show(self, snapshot: ProgressSnapshot) -> None:
        """Show progress, if what was shown last is old enough: a terminal at once, a log once a minute."""
        if snapshot.num_rows:
            self.phase(None)
        now = time.monotonic()
        every_s = LIVE_EVERY_S if self._area else LOG_EVERY_S if self.is_json else LINE_EVERY_S
        if now - self._last < every_s:
            return
        self._last = now
        if self._area is not None:
            self._area.show(snapshot)
        elif self.is_json:
            self.event("progress", phase=self._phase, **dataclasses.asdict(snapshot))
        elif self._phase is not None:
            self.say(f"{self._phase} for {duration(now - self._phase_began)}")
        else:
            self.say(snapshot.line())

    def _print(self, event: str, text: str, color: str = "") -> None:
        if self._keep is not None:
            self._keep(event, text)
        if self.is_json:
            self.event(event, text=text.strip())
        if self.is_json or (_style == "quiet" and event == "note"):
            return
        text = self._shown(text, color)
        if self._area is not None:
            self._area.print(text)
        else:
            write(self._stream, text + "\n")

    def _shown(self, text: str, color: str) -> str:
        """Return a text as it is written: safe, and in a terminal wrapped at its words and in its color."""
        text = escaped(text, keep="\n\t")
        if self._is_terminal and self._stream is not None:
            from blip2_actor.flags import wrap_for  # `__main__` first asks whether this package is ours

            text = wrap_for(self._stream, text)
        return f"{color}{text}{_RESET}" if color and self._has_color else text
