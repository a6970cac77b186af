"""`StopRequest`: a signal asks the run to stop in good order."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from types import FrameType

from pipeline.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


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
        if self._stop_at is not None:
            left = self._stop_at - datetime.now(UTC)
            signal.setitimer(signal.ITIMER_REAL, max(0.001, left.total_seconds()))
        try:
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

    def _handle(self, number: int, frame: FrameType | None) -> None:
        is_first = self.number is None
        if is_first:
            self.number = signal.Signals(number)
        if not self._is_deferred or (not is_first and number == signal.SIGINT):
            raise Interrupted(self.number or signal.Signals(number))
