"""A daemon thread that has ended before the interpreter is torn down.

A thread that computes at that time, or frees the weights of a model, aborts the process. So the exit of the
interpreter asks it to end, and waits until it has let go of everything.

The locks here are those of C: Ctrl-C can interrupt `threading.Event` and `Future` while they hold a lock of
their own, and the other thread would wait for it for ever.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any

from blip2_actor.engine.own_process import OwnProcess

logger = logging.getLogger(__name__)

INTERRUPTED = 130
"""Exit status of a process that Ctrl-C has ended, as shells give it."""


class EngineThread(threading.Thread):
    """The thread of an `EngineCore`, which it frees at its end unless other references are left."""

    def __init__(
        self, target: Callable[..., None], args: tuple[Any, ...], abandon: Callable[[], None]
    ) -> None:
        """
        Args:
            target: a method of what the thread runs.
            abandon: a method of the same object, which asks for the end when the interpreter exits. It may be
                called several times, and takes no lock that Ctrl-C could leave taken.
        """
        super().__init__(target=target, args=args, name="blip2-engine", daemon=True)
        self._abandon = weakref.WeakMethod(abandon)
        self._process = OwnProcess()
        self._runs = threading.Lock()
        """Held while the thread holds anything."""

    def start(self) -> None:
        """Start the thread.

        Raises:
            RuntimeError: the system has no more threads.
        """
        atexit.register(self._end_at_exit)
        try:
            super().start()
        except Exception:  # so there is none to wait for
            atexit.unregister(self._end_at_exit)
            raise

    def run(self) -> None:
        """Run the target, and free it."""
        with self._runs:
            super().run()
        atexit.unregister(self._end_at_exit)

    def wait(self) -> None:
        """Wait for the end.

        `join` alone does not do: once Ctrl-C has interrupted it, it takes the thread for ended (Python 3.11
        and 3.12, python/cpython#90882).
        """
        with self._runs:
            pass
        self.join()

    def _end_at_exit(self) -> None:
        if not self._process.is_current:  # a forked child has no such thread
            return
        is_warned = False
        while True:
            try:
                abandon = self._abandon()
                if abandon is not None:
                    abandon()
                with self._runs:
                    return
            except KeyboardInterrupt:
                if is_warned:
                    os._exit(INTERRUPTED)
                is_warned = True
                logger.warning(
                    "The exit waits for what the engine computes now; Ctrl-C again ends it at once"
                )
            except BaseException:  # what the handler of another signal raises
                logger.exception("The exit waits for what the engine computes now")
