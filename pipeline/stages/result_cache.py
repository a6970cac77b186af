"""`ResultCache`: results by request, so that identical images are captioned once per actor."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future

from blip2_actor import Result, Status

MAX_RESULTS = 65_536
"""A result with one text of thirty tokens takes about 2 KiB, so the cache takes at most 128 MiB with these;
longer texts, or several per image, take proportionally more. The cache holds no pixels and no tensors."""


class ResultCache:
    """Keeps the results used last. Equal requests that run at the same time share one future. Thread-safe."""

    def __init__(self, max_results: int = MAX_RESULTS) -> None:
        self._max_results = max_results
        self._lock = threading.Lock()
        self._by_key: OrderedDict[Hashable, Future[Result] | Result] = OrderedDict()

    def get(self, key: Hashable, submit: Callable[[], Future[Result]]) -> Future[Result] | Result:
        """Return the result of a request, or its future while it runs; submit the request if it is new.

        Do not cancel the future: other callers may wait for it.
        """
        with self._lock:
            cached = self._by_key.get(key)
            if cached is not None:
                self._by_key.move_to_end(key)
                return cached
            future = self._by_key[key] = submit()
            if len(self._by_key) > self._max_results:
                self._by_key.popitem(last=False)
        future.add_done_callback(lambda done: self._replace_by_result(key, done))
        return future

    def _replace_by_result(self, key: Hashable, future: Future[Result]) -> None:
        """Keep the result instead of its future, whose lock takes as much memory again."""
        with self._lock:
            if self._by_key.get(key) is not future:
                return
            if future.cancelled() or future.exception() is not None or not _is_repeatable(future.result()):
                del self._by_key[key]
            else:
                self._by_key[key] = future.result()


def _is_repeatable(result: Result) -> bool:
    """Return whether the same request would end the same way; one that ran out of memory might not."""
    return result.status in (Status.OK, Status.REFUSED)
