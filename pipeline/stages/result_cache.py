"""Results by what was asked, so that identical images are captioned once per actor."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future

from blip2_actor import Result, Status

MAX_REMEMBERED = 65_536
"""A result of one text of thirty tokens takes about 2 KiB, so 128 MiB of these; longer texts and several
per image take as many times that. No pixels and no tensors are kept."""


class ResultCache:
    """Remembers the results used last; requests for the same that run now share one future. Thread-safe."""

    def __init__(self, most: int = MAX_REMEMBERED) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._known: OrderedDict[Hashable, Future[Result] | Result] = OrderedDict()

    def get(self, key: Hashable, submit: Callable[[], Future[Result]]) -> Future[Result] | Result:
        """What is known of a key, or under way; else what `submit` gives. Do not cancel it: others wait."""
        with self._lock:
            known = self._known.get(key)
            if known is not None:
                self._known.move_to_end(key)
                return known
            future = self._known[key] = submit()
            if len(self._known) > self._most:
                self._known.popitem(last=False)
        future.add_done_callback(lambda done: self._settle(key, done))
        return future

    def _settle(self, key: Hashable, future: Future[Result]) -> None:
        """Keep the result alone: a future with its lock is as large again."""
        with self._lock:
            if self._known.get(key) is not future:
                return
            if future.cancelled() or future.exception() is not None or not _lasts(future.result()):
                del self._known[key]
            else:
                self._known[key] = future.result()


def _lasts(result: Result) -> bool:
    """Whether the same request would end so again; one that ran out of memory may not."""
    return result.status in (Status.OK, Status.REFUSED)
