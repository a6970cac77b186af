"""`StopRequest`: a signal asks the run to stop in good order."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import UTC, datetime
from types import FrameType

from pipeline.errors import Interrupted, name_of
from pipeline.progress.writing import leave_live_area
from pipeline.storage.retrying import longest_request_s

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
HANDLED_WITHIN_S = 8.0
"""Python handles a signal when the main thread next runs Python. A library that does not return until then,
such as the client of a store that does not answer, holds the process no longer than this."""
ENDED_WITHIN_S = 25.0
"""How long a job at work may take to end after the signal: writing, closing and releasing. It is less than
the 30 s after which Ray kills a job that was stopped."""
ENDED_SOON_WITHIN_S = 9.0
"""The same before and after work, and if the store of the input or output has failed or not answered since
the signal: then waiting does not help."""
NO_ANSWER_S = 4.0
"""A request that takes longer counts as one without an answer."""
LOOK_EVERY_S = 0.2

_is_command = False
"""Whether this process runs a command and nothing else, so that it may be ended."""


@contextmanager
def keeping_handlers() -> Iterator[None]:
    """Undo what the block does to the handlers of signals, in Python or below it."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)


class StopRequest:
    """Which signal, if any, has asked this process to stop.

    A signal raises `Interrupted` in the main thread, except inside `deferred`: there it is only noted, and a
    second SIGINT (Ctrl-C) raises `Interrupted`. It is noted in any case, so that other threads can stop too.

    A command that does not end in time is ended at once. A program that calls `run_job`, such as a notebook,
    never is.
    """

    def __init__(self, stop_at: datetime | None = None, is_command: bool = False) -> None:
        """Prepare a request.

        Args:
            stop_at: when to stop by itself, by SIGALRM.
            is_command: whether this process runs a command and nothing else. It also holds for the requests
                inside the block of this one.
        """
        self._stop_at = stop_at
        self._is_command = is_command
        self.store_fails = False
        """Whether the store of the input or output is known to fail now; set from outside."""
        self.number: signal.Signals | None = None
        """The first signal that has arrived."""
        self._is_deferred = False
        self._came_at_work = False
        self._is_handled = threading.Event()
        self._is_over = threading.Event()

    @contextmanager
    def by_signals(self) -> Iterator[StopRequest]:
        """Handle SIGTERM, SIGINT and SIGHUP inside the block; what is ignored, as by nohup, stays ignored.

        Outside the main thread signals cannot be handled, and nothing changes.
        """
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.getsignal(number) for number in SIGNALS}
        handled = [number for number, handler in before.items() if handler is not signal.SIG_IGN]
        if self._stop_at is not None:
            before[signal.SIGALRM] = signal.getsignal(signal.SIGALRM)
            handled.append(signal.SIGALRM)
        for number in handled:
            signal.signal(number, self._handle)
        try:
            with self._watched(handled) if _is_command or self._is_command else nullcontext(), self.named():
                if self._stop_at is not None:
                    left = self._stop_at - datetime.now(UTC)
                    signal.setitimer(signal.ITIMER_REAL, max(0.001, left.total_seconds()))
                yield self
        finally:
            if self._stop_at is not None:
                signal.setitimer(signal.ITIMER_REAL, 0)
            for number in handled:
                signal.signal(number, before[number])

    @contextmanager
    def named(self) -> Iterator[None]:
        """Raise the `Interrupted` of the signal if Ray raises a plain KeyboardInterrupt in its place.

        `ray.get` does that: its C++ asks Python for signals, and keeps no error of a handler (Ray 2.60).
        """
        try:
            yield
        except KeyboardInterrupt as error:
            if self.number is None or isinstance(error, Interrupted):
                raise
            raise Interrupted(self.number) from error

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Only note a signal inside the block, which must look at `number`."""
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False

    @contextmanager
    def _watched(self, handled: Collection[signal.Signals]) -> Iterator[None]:
        """End this process if one of the signals comes inside the block, and it does not end in time."""
        global _is_command
        is_inner, _is_command = _is_command, True
        receiving, sending = os.pipe()
        terminal = os.dup(2)  # While Ray starts, standard error itself is silent.
        os.set_blocking(sending, False)  # as `signal.set_wakeup_fd` requires
        before = signal.set_wakeup_fd(sending)
        watching = threading.Thread(
            target=self._watch, args=(receiving, handled, terminal), daemon=True, name="signals"
        )
        watching.start()
        try:
            yield
        finally:
            self._is_handled.set()
            self._is_over.set()
            _is_command = is_inner
            signal.set_wakeup_fd(before)
            os.close(sending)
            watching.join()
            os.close(terminal)

    def _watch(self, receiving: int, handled: Collection[signal.Signals], terminal: int) -> None:
        with os.fdopen(receiving, "rb", buffering=0) as numbers:
            # The pipe has all signals that Python handles, including those of other parts of the program.
            number = next((n for n in iter(lambda: numbers.read(1), b"") if n[0] in handled), None)
            arrived = time.monotonic()
            is_handled = number is None or self._is_handled.wait(HANDLED_WITHIN_S)
            if number is None or (is_handled and self._ends_in_time(arrived)):
                numbers.read()  # until the end of the block: Python complains about a pipe that nobody reads
                return
        number = signal.Signals(number[0])
        held_by = "a store or Ray" if is_handled else "a library"
        said = f"stopped at once by {name_of(number)}: {held_by} did not return; finished work is kept"
        _kill_children()
        leave_live_area()
        os.write(terminal, f"blip2: {said}\n".encode())
        os._exit(128 + (signal.SIGTERM if number == signal.SIGALRM else number))

    def _ends_in_time(self, arrived: float) -> bool:
        """Wait for the end of the block; return False when it is late."""
        has_store = True
        while not self._is_over.wait(LOOK_EVERY_S):
            # A store that has failed once since the signal is not waited for again: the next request may take
            # as long as the one that was given up.
            has_store = has_store and not self.store_fails and longest_request_s() < NO_ANSWER_S
            limit_s = ENDED_WITHIN_S if self._came_at_work and has_store else ENDED_SOON_WITHIN_S
            if time.monotonic() - arrived > limit_s:
                return False
        return True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._is_handled.set()
        is_first = self.number is None
        if is_first:
            self.number = signal.Signals(number)
            self._came_at_work = self._is_deferred
        if not self._is_deferred or (not is_first and number == signal.SIGINT):
            raise Interrupted(self.number or signal.Signals(number))


def _kill_children() -> None:
    """Kill the children of this process, such as Ray, whose agents would run on for a minute."""
    import psutil  # hardly any command needs it

    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            process.kill()
