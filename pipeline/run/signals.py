"""`StopRequest`: a signal asks the run to stop in good order."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class StopRequest:
    """Which signal, if any, has asked the run to stop."""

    def __init__(self) -> None:
        self.number: signal.Signals | None = None
        """The first signal that has arrived."""

    @contextmanager
    def by_signals(self) -> Iterator[None]:
        """Let SIGTERM and SIGINT set the request; a second SIGINT (Ctrl-C) ends the process at once.

        Outside the main thread signals cannot be handled, and nothing changes.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def handle(number: int, _: object) -> None:
            if self.number is None:
                self.number = signal.Signals(number)
            elif number == signal.SIGINT:
                raise KeyboardInterrupt

        before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
