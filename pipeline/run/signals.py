"""`StopRequest`: a signal asks the run to stop in good order."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
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

    def __init__(self) -> None:
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
        for number in handled:
            signal.signal(number, self._handle)
        try:
            yield
        finally:
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
