"""Share work between equal requests, and keep its results in bounded memory."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Hashable
from dataclasses import dataclass
from typing import Any

from deploy.calls.shared_calls import begin_shared
from deploy.observe.metrics import CACHE_BYTES, CACHE_REQUESTS
from deploy.reuse.made import Made


@dataclass
class _Flight:
    task: asyncio.Task[Made]
    num_waiting: int = 0


class SharedWork:
    """Makes equal work once while it runs, and keeps what was used last.

    The work of a request ends early only when every caller that waits for it has left. Work that fails is not
    kept.
    """

    def __init__(self, max_bytes: int) -> None:
        """Start with nothing.

        Args:
            max_bytes: memory for what has been made; 0 keeps nothing.
        """
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._kept: OrderedDict[Hashable, Made] = OrderedDict()
        self._flights: dict[Hashable, _Flight] = {}

    async def get(self, key: Hashable, make: Callable[[], Coroutine[Any, Any, Made]]) -> Made:
        """Return what was made for an equal request, or make it; raise what making it raises."""
        if (known := self._kept.get(key)) is not None:
            self._kept.move_to_end(key)
            CACHE_REQUESTS.inc(1, {"result": "kept"})
            return known
        flight = self._flights.get(key)
        CACHE_REQUESTS.inc(1, {"result": "made" if flight is None else "joined"})
        if flight is None:
            flight = self._flights[key] = _Flight(begin_shared(make()))
            flight.task.add_done_callback(lambda _: self._land(key, flight))
        flight.num_waiting += 1
        try:
            return await asyncio.shield(flight.task)
        finally:
            flight.num_waiting -= 1
            if not flight.num_waiting and not flight.task.done():
                del self._flights[key]  # later requests start again
                flight.task.cancel()

    def _land(self, key: Hashable, flight: _Flight) -> None:
        failed = flight.task.cancelled() or flight.task.exception() is not None
        if self._flights.get(key) is not flight:  # all callers have left, and another may be under way
            return
        del self._flights[key]
        if not failed:
            self._keep(key, flight.task.result())

    def _keep(self, key: Hashable, made: Made) -> None:
        self._kept[key] = made
        self._num_bytes += made.num_bytes
        while self._num_bytes > self._max_bytes:
            _, oldest = self._kept.popitem(last=False)
            self._num_bytes -= oldest.num_bytes
        self.show()

    def show(self) -> None:
        """Set the gauge of memory; Ray drops one that is not set for 20 s."""
        CACHE_BYTES.set(self._num_bytes)
