"""`FairGate`: a semaphore for unequal requests, with a lane for small work and a fair line behind it.

The line is self-clocked fair queueing (Golestani, 1994): each waiting request is stamped with the virtual
time at which its flow would be done with it, and the lowest stamp goes first. A flow is a caller and a size,
so neither the many requests of one caller nor large requests as a whole hold up the small ones of another.
The first in line gets the next free units, however many it needs.
"""

from __future__ import annotations

import asyncio
import bisect
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

MAX_RETRY_AFTER_S = 60.0
_RATE_WINDOW_S = 30.0


@dataclass(order=True)
class _Waiting:
    stamp: float
    number: int
    units: int = field(compare=False)
    work: int = field(compare=False)
    is_small: bool = field(compare=False)
    flow: tuple[str, int] = field(compare=False)
    admitted: asyncio.Future[None] = field(compare=False)


class FairGate:
    """Lets requests hold `capacity` units between them; those that are not small leave some units free."""

    def __init__(self, capacity: int, *, small_work: int, kept_for_small: int = 0) -> None:
        """Open the gate.

        Args:
            capacity: units that are held at once, such as slots or processes.
            small_work: maximum work of a small request, such as steps or pixels.
            kept_for_small: units that only small requests may hold.
        """
        self._capacity = capacity
        self._capacity_for_large = max(1, capacity - kept_for_small)
        self._small_work = small_work
        self._units_held = 0
        self._units_held_by_large = 0
        self._waiting: list[_Waiting] = []
        self._num_asked = 0
        self._virtual_time = 0.0
        self._stamps: dict[tuple[str, int], float] = {}
        self._rate = _Rate()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def units_held(self) -> int:
        return self._units_held

    @property
    def is_full(self) -> bool:
        return self._units_held >= self._capacity

    async def enter(self, units: int, work: int, caller: str) -> Callable[[], None]:
        """Wait in line, then hold units until the returned function is called.

        Args:
            units: units to hold; reduced to the most that a request of its size can have.
            work: decides size and turn, such as steps or pixels.
            caller: the caller, for fair turns.
        """
        is_small = work <= self._small_work and units <= max(1, self._capacity - self._capacity_for_large)
        units = min(units, self._capacity if is_small else self._capacity_for_large)
        waiting = self._line_up(units, work, is_small, (caller, work.bit_length()))
        try:
            await waiting.admitted
        except asyncio.CancelledError:
            if waiting in self._waiting:
                self._forget(waiting)
                self._admit_those_that_fit()
            else:
                self._leave(waiting)
            raise
        return lambda: self._leave(waiting)

    def wait_s(self) -> float | None:
        """Return how long a new request would wait behind all others; None if unknown."""
        if not self._waiting:
            return 0.0
        per_s = self._rate.per_s
        return sum(waiting.work for waiting in self._waiting) / per_s if per_s else None

    def _line_up(self, units: int, work: int, is_small: bool, flow: tuple[str, int]) -> _Waiting:
        stamp = max(self._virtual_time, self._stamps.get(flow, 0.0)) + work
        self._stamps[flow] = stamp
        self._num_asked += 1
        admitted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiting = _Waiting(stamp, self._num_asked, units, work, is_small, flow, admitted)
        bisect.insort(self._waiting, waiting)
        self._admit_those_that_fit()
        return waiting

    def _forget(self, waiting: _Waiting) -> None:
        """Remove a request that has given up, so that it no longer holds up the next one of its flow."""
        self._waiting.remove(waiting)
        stamps = (each.stamp for each in self._waiting if each.flow == waiting.flow)
        self._stamps[waiting.flow] = max(stamps, default=0.0)

    def _leave(self, left: _Waiting) -> None:
        self._rate.finish(left.work)
        self._units_held -= left.units
        self._units_held_by_large -= 0 if left.is_small else left.units
        self._admit_those_that_fit()

    def _admit_those_that_fit(self) -> None:
        is_large_blocked = False
        for waiting in list(self._waiting):
            if waiting.admitted.cancelled():  # it has given up, and is about to leave the line
                continue
            if not waiting.is_small:
                is_large_blocked |= self._units_held_by_large + waiting.units > self._capacity_for_large
                if is_large_blocked:
                    continue
            if self._units_held + waiting.units > self._capacity:
                # Otherwise those behind it would take each free unit. If this one is large, small ones hold
                # more than what is kept for them, and never fall below that.
                break
            self._let_in(waiting)
        if not self._waiting:
            self._stamps.clear()  # an idle gate has no debts
            self._virtual_time = 0.0

    def _let_in(self, waiting: _Waiting) -> None:
        self._waiting.remove(waiting)
        self._virtual_time = max(self._virtual_time, waiting.stamp)
        self._units_held += waiting.units
        self._units_held_by_large += 0 if waiting.is_small else waiting.units
        self._rate.start()
        waiting.admitted.set_result(None)


class _Rate:
    """Work finished per second in the last half minute or so, not counting the time without work."""

    def __init__(self) -> None:
        self._work = 0.0
        self._busy_s = 0.0
        self._num_running = 0
        self._at_s = 0.0

    @property
    def per_s(self) -> float:
        return self._work / self._busy_s if self._busy_s > 0 else 0.0

    def start(self) -> None:
        self._pass_time()
        self._num_running += 1

    def finish(self, work: int) -> None:
        self._pass_time()
        self._num_running -= 1
        self._work += work

    def _pass_time(self) -> None:
        now_s = time.monotonic()
        if self._num_running:
            elapsed_s = now_s - self._at_s
            fades = math.exp(-elapsed_s / _RATE_WINDOW_S)
            self._work *= fades
            self._busy_s = self._busy_s * fades + elapsed_s
        self._at_s = now_s
