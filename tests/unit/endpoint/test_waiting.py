"""Several threads that wait for one endpoint report it as one."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipeline.endpoint import waiting
from pipeline.endpoint.waiting import KeyRefused, Outage
from pipeline.storage.retrying import Trouble, listen


class Told:
    """Return everything that this process's listener was told."""

    def __init__(self) -> None:
        self.told: list[Trouble | None] = []
        self._grown = threading.Condition()

    def __call__(self, trouble: Trouble | None) -> bool:
        with self._grown:
            self.told.append(trouble)
            self._grown.notify_all()
        return True

    def wait_for(self, number: int) -> None:
        with self._grown:
            assert self._grown.wait_for(lambda: len(self.told) >= number, timeout=5)


@pytest.fixture
def listener(monkeypatch: pytest.MonkeyPatch) -> Iterator[Told]:
    monkeypatch.setattr(waiting, "TELL_EVERY_S", 0.01)
    told = Told()
    listen(told)
    yield told
    listen(None)


def test_nobody_tells_of_trouble_after_its_end(listener: Told) -> None:
    outage, is_ended = Outage(), threading.Event()
    outage.wait("gives no answer", 0.02, is_ended)
    with ThreadPoolExecutor(4) as threads:
        outage._pause_s = 30.0  # as after many tries
        waits = [threads.submit(outage.wait, "gives no answer", 0.02, is_ended) for _ in range(4)]
        listener.wait_for(8)
        outage.end()
        assert all(one.result(timeout=5) for one in waits)
    assert listener.told.count(None) == 1 and listener.told[-1] is None


def test_the_endpoint_gets_the_pause_it_asks_for(listener: Told) -> None:
    outage, is_ended = Outage(), threading.Event()
    with ThreadPoolExecutor(1) as threads:
        waiting_thread = threads.submit(outage.wait, "not_ready", 60.0, is_ended)
        listener.wait_for(1)
        outage.end()
        with pytest.raises(TimeoutError):
            waiting_thread.result(timeout=0.1)
        is_ended.set()
        assert waiting_thread.result(timeout=5) is False


def test_only_a_key_that_is_refused_for_long_ends_the_job(
    listener: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An endpoint that is gone for any time may come back, and the first refusal may be a mistake."""
    monkeypatch.setattr(waiting, "MAX_PAUSE_S", 0.02)
    outage, is_ended = Outage(), threading.Event()

    def said(refuses_key: bool) -> type[Trouble | None]:
        outage.wait("state", 0.02, is_ended, refuses_key)
        return type(listener.told[-1])

    long_ago = time.monotonic() - 2 * waiting.KEY_PATIENCE_S
    outage._since = long_ago
    assert said(refuses_key=False) is Trouble
    assert said(refuses_key=True) is Trouble, "its time begins with the first refusal"
    outage._key_refused_since = long_ago
    assert said(refuses_key=True) is KeyRefused
    assert said(refuses_key=False) is Trouble
    assert said(refuses_key=True) is Trouble, "the endpoint was away meanwhile, and may have another answer"
    outage._key_refused_since = long_ago
    outage.end()
    assert said(refuses_key=True) is Trouble
