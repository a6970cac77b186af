"""`StopRequest`: a signal asks the run to stop in good order."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from types import FrameType

from pipeline.errors import Interrupted, name_of

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
HANDLED_WITHIN_S = 8.0
"""Python handles a signal when the main thread next runs Python. A library that does not return until then,
such as the client of a store that does not answer, holds the process no longer than this."""
ENDED_WITHIN_S = 25.0
"""How long writing, closing and releasing may take after that: a store that does not answer may hold each
step for minutes. It is less than the 30 s after which Ray kills a job that was stopped."""


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
    """

    def __init__(self, stop_at: datetime | None = None) -> None:
        """Prepare a request.

        Args:
            stop_at: when to stop without a signal of anybody, by SIGALRM.
        """
        self._stop_at = stop_at
        self.number: signal.Signals | None = None
        """The first signal that has arrived."""
        self._is_deferred = False
        self._is_handled = threading.Event()
        self._is_over = threading.Event()

    @contextmanager
    def by_signals(self) -> Iterator[None]:
        """Handle SIGTERM, SIGINT and SIGHUP inside the block; what is ignored, as by nohup, stays ignored.

        Outside the main thread signals cannot be handled, and nothing changes.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in SIGNALS}
        handled = [number for number, handler in before.items() if handler is not signal.SIG_IGN]
        if self._stop_at is not None:
            before[signal.SIGALRM] = signal.getsignal(signal.SIGALRM)
            handled.append(signal.SIGALRM)
        for number in handled:
            signal.signal(number, self._handle)
        try:
            with self._watched(handled):
                if self._stop_at is not None:
                    left = self._stop_at - datetime.now(UTC)
                    signal.setitimer(signal.ITIMER_REAL, max(0.001, left.total_seconds()))
                yield
        finally:
            if self._stop_at is not None:
                signal.setitimer(signal.ITIMER_REAL, 0)
            for number in handled:
                signal.signal(number, before[number])

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
        receiving, sending = os.pipe()
        os.set_blocking(sending, False)  # as `signal.set_wakeup_fd` requires
        before = signal.set_wakeup_fd(sending)
        watching = threading.Thread(
            target=self._watch, args=(receiving, handled), daemon=True, name="signals"
        )
        watching.start()
        try:
            yield
        finally:
            self._is_handled.set()
            self._is_over.set()
            signal.set_wakeup_fd(before)
            os.close(sending)
            watching.join()

    def _watch(self, receiving: int, handled: Collection[signal.Signals]) -> None:
        with os.fdopen(receiving, "rb", buffering=0) as numbers:
            # All signals that Python handles are in the pipe, those of other parts of the program too.
            number = next((n for n in iter(lambda: numbers.read(1), b"") if n[0] in handled), None)
            is_handled = number is None or self._is_handled.wait(HANDLED_WITHIN_S)
            if number is None or (is_handled and self._is_over.wait(ENDED_WITHIN_S)):
                numbers.read()  # until the end of the block: Python complains about a pipe that nobody reads
                return
        number = signal.Signals(number[0])
        held_by = "a store or Ray" if is_handled else "a library"
        said = f"stopped at once by {name_of(number)}: {held_by} did not return; finished work is kept"
        os.write(2, f"blip2: {said}\n".encode())
        os._exit(128 + (signal.SIGTERM if number == signal.SIGALRM else number))

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._is_handled.set()
        is_first = self.number is None
        if is_first:
            self.number = signal.Signals(number)
        if not self._is_deferred or (not is_first and number == signal.SIGINT):
            raise Interrupted(self.number or signal.Signals(number))
