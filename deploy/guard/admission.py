"""Admission to a gateway: who may wait, in which order, and for how long."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar

from deploy.guard.callers import CALLER, Caller
from deploy.guard.cost import Cost
from deploy.guard.fair_gate import MAX_RETRY_AFTER_S, FairGate
from deploy.http.errors import RETRY_AFTER_S, ApiError, full, overloaded, unavailable
from deploy.observe.metrics import (
    ADMITTED_COST,
    QUEUE_SECONDS,
    REFUSED_COST,
    REFUSED_REQUESTS,
    REQUESTS_IN_FLIGHT,
)
from deploy.observe.request_record import timed

BATCH_LEAD = 2
"""Batch work for this many times the slots is held, so that an engine always has some."""
SMALL_SLOT_STEPS = 1024
"""Maximum slot-steps of small work: a caption of 30 tokens has 30, or 150 with five beams."""


_IS_SERVED: ContextVar[bool] = ContextVar("_IS_SERVED", default=False)
"""Whether this request has been let in before its cost was known."""


class Admission:
    """Lets requests share the slots of the engines, small ones ahead, callers in turn."""

    def __init__(self, *, slots: int, max_in_flight: int, timeout_s: float) -> None:
        """Open the gateway.

        Args:
            slots: slots of the engines that all requests hold at once; half of them are for small work.
            max_in_flight: requests that are served or wait at once.
            timeout_s: seconds from admission to the answer.
        """
        self._gate = FairGate(slots, small_work=SMALL_SLOT_STEPS, kept_for_small=slots // 2)
        self._max_in_flight = max_in_flight
        self._timeout_s = timeout_s
        self._num_in_flight_of: Counter[str] = Counter()
        self._max_batch_slots = BATCH_LEAD * slots
        self._batch_slots = 0
        self._is_draining = self._is_ending = False
        self._is_idle = asyncio.Event()
        self._is_idle.set()

    def check_open(self) -> None:
        """Raise ApiError 503 when the gateway is draining."""
        if self._is_draining or self._is_ending:
            raise unavailable("the service is draining")

    def set_draining(self, is_draining: bool) -> None:
        """Refuse new requests from now on, or accept them again."""
        self._is_draining = is_draining

    async def drain(self) -> None:
        """Refuse new requests for good, and wait until every admitted one has its answer."""
        self._is_ending = True
        await self._is_idle.wait()

    @property
    def is_busy(self) -> bool:
        """Whether a request waits, or one that came now would."""
        return self._gate.num_waiting > 0 or self._gate.is_full

    def stats(self) -> dict[str, int | bool]:
        """Return what is admitted and waits now."""
        return {
            "num_in_flight": self._num_in_flight_of.total(),
            "num_callers": len(self._num_in_flight_of),
            "num_waiting": self._gate.num_waiting,
            "slots_held": self._gate.units_held,
            "batch_slots_held": self._batch_slots,
            "is_draining": self._is_draining or self._is_ending,
        }

    @asynccontextmanager
    async def serve(self, cost: Cost | None) -> AsyncIterator[None]:
        """Let a request in while the block runs, and end the block when its time is over.

        Args:
            cost: of everything that the block holds by `slots`, one after the other or at once. None if it is
                not known yet; then a second `serve` in the block, with the cost, changes nothing.

        Raises:
            ApiError: 429, 503 or 504.
        """
        if _IS_SERVED.get():
            yield
            return
        caller = CALLER.get()
        try:
            self.check_open()
            self._refuse_too_many(caller)
        except ApiError as refusal:
            REFUSED_REQUESTS.inc(1, {"reason": refusal.type})
            if cost is not None:
                REFUSED_COST.inc(cost.slot_steps, {"reason": refusal.type})
            raise
        self._count(caller, 1)
        is_served = _IS_SERVED.set(cost is None)
        try:
            async with asyncio.timeout(self._timeout_s):
                yield
        except TimeoutError:
            message = f"no answer within {self._timeout_s:g} s; try again, or ask for less"
            raise ApiError(504, "timeout", message) from None
        finally:
            _IS_SERVED.reset(is_served)
            self._count(caller, -1)

    @asynccontextmanager
    async def slots(self, cost: Cost) -> AsyncIterator[None]:
        """Wait for slots, and hold them while the block runs; for a request that `serve` has let in."""
        ADMITTED_COST.inc(cost.slot_steps)
        with timed("queue", QUEUE_SECONDS):
            leave = await self._gate.enter(cost.slots, cost.slot_steps, CALLER.get().name)
        try:
            yield
        finally:
            leave()

    @asynccontextmanager
    async def admit_batch(self, cost: Cost) -> AsyncIterator[Callable[[], None]]:
        """Hold what batch work costs, next to all other requests, while the block runs.

        The block gets a function that raises ApiError when it should end: because the gateway is draining, or
        because its time is over: 504 if the work is too long for it, 503 if others have the slots. Batch work
        does not hold up draining, and nothing waits for its slots.

        Raises:
            ApiError: 403 or 503.
        """
        caller = CALLER.get()
        self.check_open()
        if not caller.may_send_batches:
            message = (
                f"the key {caller.name} has no right to send batch work; make one that has it with "
                f"python -m deploy.guard.keys {caller.name} --batch"
            )
            raise ApiError(403, "no_batch_right", message)
        if self._batch_slots and self._batch_slots + cost.slots > self._max_batch_slots:
            REFUSED_REQUESTS.inc(1, {"reason": "batch"})
            raise overloaded(f"batch work for {self._batch_slots} slots waits already")
        ends_at_s = time.monotonic() + self._timeout_s
        self._batch_slots += cost.slots

        def check() -> None:
            self.check_open()
            if time.monotonic() > ends_at_s:
                if self._gate.is_full:
                    raise unavailable(f"other requests have the slots, for {self._timeout_s:g} s now")
                raise ApiError(504, "timeout", f"not finished within {self._timeout_s:g} s; ask again")

        try:
            yield check
        finally:
            self._batch_slots -= cost.slots

    def _count(self, caller: Caller, num_more: int) -> None:
        """Note that a caller has one request more or less in flight."""
        self._num_in_flight_of[caller.name] += num_more
        if not self._num_in_flight_of[caller.name]:
            del self._num_in_flight_of[caller.name]
        if self._num_in_flight_of:
            self._is_idle.clear()
        else:
            self._is_idle.set()
        self.show()

    def show(self) -> None:
        """Set the gauge of requests; Ray drops one that is not set for 20 s."""
        REQUESTS_IN_FLIGHT.set(self._num_in_flight_of.total())

    def _refuse_too_many(self, caller: Caller) -> None:
        num_of_caller = self._num_in_flight_of[caller.name]
        retry_after_s = min(max(self._gate.wait_s() or 0.0, RETRY_AFTER_S), MAX_RETRY_AFTER_S)
        if caller.max_in_flight is not None and num_of_caller >= caller.max_in_flight:
            message = f"the key {caller.name} has {num_of_caller} requests in flight, which is its quota"
            raise ApiError(429, "quota", message, retry_after_s=retry_after_s)
        num_in_flight = self._num_in_flight_of.total()
        if num_in_flight >= self._max_in_flight:
            raise full(num_in_flight, retry_after_s)
