"""`SharedExclusiveLock`: many calls run in a process together, or one runs alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class SharedExclusiveLock:
    """A lock that many threads hold as shared, or one thread holds as exclusive.

    A thread that waits for exclusive access goes first: from then on, no thread gets shared access before it.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._num_shared = 0
        self._num_waiting_for_exclusive = 0
        self._is_exclusive = False

    @property
    def is_exclusive_wanted(self) -> bool:
        """Whether a thread waits for exclusive access."""
        return self._num_waiting_for_exclusive > 0

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Hold the lock together with other threads."""
        with self._condition:
            self._condition.wait_for(lambda: not (self._is_exclusive or self.is_exclusive_wanted))
            self._num_shared += 1
        try:
            yield
        finally:
            with self._condition:
                self._num_shared -= 1
                self._condition.notify_all()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the lock alone."""
        with self._condition:
            self._num_waiting_for_exclusive += 1
            self._condition.wait_for(lambda: not (self._is_exclusive or self._num_shared))
            self._num_waiting_for_exclusive -= 1
            self._is_exclusive = True
        try:
            yield
        finally:
            with self._condition:
                self._is_exclusive = False
                self._condition.notify_all()
