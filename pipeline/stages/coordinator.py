"""The board: a tiny actor beside the stages that remembers what a dying process cannot.

It counts the deaths of each caption call, so that the one image that kills the engine is found and
gets its status instead of killing for ever, keeps the receipts of fragments that such a call had
written, gathers how busy the stages are, and passes on the word to stop.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.ledger.rowset import Range, RowSet

SOLO_DEATHS = 2
"""Deaths while a row ran alone in its process until it is condemned: one may be chance, a node taken away."""


@dataclass(frozen=True)
class Receipt:
    """Rows of one shard that have reached a fragment."""

    shard: str
    ranges: tuple[Range, ...]
    by_status: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Attempt:
    """What a call must know before it starts; positions are those in its table."""

    number: int
    """1 for a call that has never died."""
    finished: tuple[Range, ...]
    """Positions that reached a fragment in an earlier attempt."""
    suspects: tuple[Range, ...]
    """Positions one of which has killed the process: each is to run alone."""
    condemned: frozenset[int]
    """Positions that get a status instead of another try."""
    receipts: tuple[Receipt, ...]
    """Of the finished positions."""


@dataclass
class _Call:
    number: int = 0
    trying: Range | None = None
    finished: RowSet = field(default_factory=RowSet)
    suspects: RowSet = field(default_factory=RowSet)
    solo_deaths: dict[int, int] = field(default_factory=dict)
    receipts: list[Receipt] = field(default_factory=list)


@dataclass(frozen=True)
class Load:
    """How busy one worker of a stage was."""

    busy_s: float
    alive_s: float


class Coordinator:
    """A plain class; the job makes an actor of it that takes no CPU."""

    def __init__(self) -> None:
        self._calls: dict[str, _Call] = {}
        self._loads: dict[str, dict[str, tuple[float, float]]] = {}
        self._fresh: list[Receipt] = []
        self._stopping = False

    def begin(self, call: str) -> Attempt:
        """Note that a call starts; where it has started before and not ended, its process has died."""
        state = self._calls.setdefault(call, _Call())
        state.number += 1
        if state.trying is not None:
            start, stop = state.trying
            if stop - start == 1:
                state.solo_deaths[start] = state.solo_deaths.get(start, 0) + 1
            state.suspects.add(start, stop)
            state.trying = None
        return Attempt(
            number=state.number,
            finished=tuple(state.finished),
            suspects=tuple(state.suspects),
            condemned=frozenset(row for row, n in state.solo_deaths.items() if n >= SOLO_DEATHS),
            receipts=tuple(state.receipts),
        )

    def trying(self, call: str, start: int, stop: int) -> None:
        """Note that these positions now run with nothing else in their process."""
        if call in self._calls:
            self._calls[call].trying = (start, stop)

    def wrote(self, call: str, positions: Sequence[Range], receipts: Sequence[Receipt]) -> None:
        """Note that these positions have reached fragments."""
        self._fresh.extend(receipts)
        if call in self._calls:
            state = self._calls[call]
            state.trying = None
            state.finished.update(positions)
            state.receipts.extend(receipts)

    def end(self, call: str) -> None:
        self._calls.pop(call, None)

    def stop(self) -> None:
        """Ask all calls to write what they have and return."""
        self._stopping = True

    def is_stopping(self) -> bool:
        return self._stopping

    def num_running(self) -> int:
        return len(self._calls)

    def report(self, stage: str, worker: str, busy_s: float, alive_s: float) -> None:
        """Note what a worker says of itself; it lives on while it says nothing."""
        self._loads.setdefault(stage, {})[worker] = (busy_s, alive_s - time.monotonic())

    def news(self) -> tuple[list[Receipt], dict[str, dict[str, Load]]]:
        """Receipts since the last time, long before their calls end; loads by stage and worker."""
        fresh, self._fresh = self._fresh, []
        now = time.monotonic()
        loads = {
            stage: {worker: Load(busy_s, born_s + now) for worker, (busy_s, born_s) in workers.items()}
            for stage, workers in self._loads.items()
        }
        return fresh, loads


@dataclass(frozen=True)
class ReportLoad:
    """Tells the board how busy one worker is; goes to workers with the board's handle."""

    coordinator: Any
    stage: str

    def __call__(self, worker: str, busy_s: float, alive_s: float) -> None:
        self.coordinator.report.remote(self.stage, worker, busy_s, alive_s)
