"""A closed stream leaves no thread that calls Ray: `ray.shutdown` would end the process inside it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any, cast

from pipeline.run.stream import ReceiptStream


class StartingExecutor(threading.Thread):
    """Ignores a request to stop that comes before its start, as Ray Data does."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.asked_too_early, self.asked = threading.Event(), threading.Event()

    def shutdown(self, force: bool) -> None:
        (self.asked if self.is_alive() else self.asked_too_early).set()

    def run(self) -> None:
        self.asked.wait(30)


class StartingDataset:
    """Starts its executor only after it has been asked to stop."""

    def __init__(self) -> None:
        self.executor = StartingExecutor()
        self.is_created = threading.Event()
        self._create_executor: Callable[[], StartingExecutor] = lambda: self.executor

    def iter_internal_ref_bundles(self) -> Iterator[Any]:
        executor = self._create_executor()
        self.is_created.set()
        executor.asked_too_early.wait(30)
        executor.start()
        return iter(())


def test_a_stream_that_is_closed_while_its_dataset_starts_leaves_no_thread():
    dataset = StartingDataset()
    stream = ReceiptStream(cast(Any, dataset))
    assert dataset.is_created.wait(30)
    stream.close()
    assert not dataset.executor.is_alive()
    assert not stream._thread.is_alive()
