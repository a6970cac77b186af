"""`LiveArea`: the last lines of a terminal, which change while a job runs: bars and a line."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import IO, TextIO, cast

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from pipeline.progress.snapshot import SEPARATOR, ProgressSnapshot
from pipeline.progress.wording import cut, duration
from pipeline.progress.writing import columns, write

REFRESHES_PER_S = 4.0
WIDE = 60
"""Narrower terminals have no room for how busy the stages are."""
MIN_COLUMNS, MIN_LINES = 30, 9
"""Smaller terminals get the line alone."""


class LiveArea:
    """Draws itself four times a second, until it is closed. No line of it is as wide as the terminal."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._console = Console(file=cast(IO[str], _Careful(stream)), force_terminal=True, highlight=False)
        self._phase: str | None = None
        self._phase_began = 0.0
        self._snapshot: ProgressSnapshot | None = None
        self._spinner = Spinner("line" if self._console.options.ascii_only else "dots")
        self._live = Live(
            console=self._console,
            get_renderable=self._render,
            refresh_per_second=REFRESHES_PER_S,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._live.start()

    def print(self, text: str) -> None:
        """Print a line above the area. It may hold escape codes for color, and is as long as it is."""
        self._console.print(Text.from_ansi(text), soft_wrap=True)

    def begin_phase(self, name: str | None) -> None:
        """Show a phase of the start, and how long it has taken; None ends it."""
        self._phase, self._phase_began = name, time.monotonic()
        self._live.refresh()

    def show(self, snapshot: ProgressSnapshot) -> None:
        """Show this progress from now on."""
        self._snapshot = snapshot

    def close(self) -> None:
        """Remove the area from the terminal."""
        self._live.stop()

    def _render(self) -> RenderableType:
        width = columns(self._stream) - 1  # some terminals wrap when the last column is written
        self._console.width = max(1, width)
        if self._phase is not None:
            elapsed = duration(time.monotonic() - self._phase_began)
            self._spinner.update(text=Text(cut(f"{self._phase}{SEPARATOR}{elapsed}", max(1, width - 2))))
            return self._spinner
        if self._snapshot is None:
            return ""
        has_bars = width >= MIN_COLUMNS and self._console.height >= MIN_LINES
        line = _line(self._snapshot, width, has_bars)
        return Group(_bars(self._snapshot, width), line) if has_bars else line


def _bars(snapshot: ProgressSnapshot, width: int) -> Table:
    table = Table.grid(expand=True, padding=(0, 1, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(ratio=1)
    table.add_column(no_wrap=True, justify="right")
    if width >= WIDE:
        table.add_column(no_wrap=True, justify="right", style="dim", min_width=len("100% busy"))
    for stage, done, total in _stages(snapshot):
        bar = ProgressBar(total=total, completed=min(done, total or done), pulse=total is None)
        numbers = f"{done:,}" if total is None else f"{done:,}/{max(done, total):,.0f}"
        busy = snapshot.busy.get(stage)
        last = [] if width < WIDE else ["" if busy is None else f"{busy:.0%} busy"]
        table.add_row(stage, bar, numbers, *last)
    return table


def _stages(snapshot: ProgressSnapshot) -> Iterator[tuple[str, int, float | None]]:
    """Yield each stage with what it has done, and what there is to do."""
    for stage, done in snapshot.rows_by_stage.items():
        yield stage, done, snapshot.total_rows
    yield "caption", snapshot.num_rows, snapshot.total_rows
    yield "shards", snapshot.shards_done, snapshot.num_shards


def _line(snapshot: ProgressSnapshot, width: int, has_bars: bool) -> Text:
    line = Text(no_wrap=True, overflow="ellipsis")
    for name, text in snapshot.parts(width, without=("shards", "busy") if has_bars else ()).items():
        style = {"trouble": "yellow", "failed": "red" if snapshot.num_failed else "", "images": "bold"}
        line.append(SEPARATOR if line else "").append(text, style.get(name, ""))
    return line


class _Careful:
    """A stream for rich that survives a terminal without some characters, and one that has gone."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    @property
    def encoding(self) -> str:
        return self._stream.encoding or "utf-8"

    def write(self, text: str) -> int:
        write(self._stream, text)
        return len(text)

    def flush(self) -> None:
        """Do nothing: `write` has flushed."""

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._stream.fileno()
