"""Signals: a run that does not notice SIGTERM loses the rows of its running calls on a preempted machine."""

from __future__ import annotations

import signal
import threading

import pytest

from pipeline.run.signals import StopRequest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_for_a_stop_and_the_handlers_come_back(number):
    before = signal.getsignal(number)
    stop = StopRequest()
    with stop.by_signals():
        assert stop.number is None
        signal.raise_signal(number)
        assert stop.number == number
    assert signal.getsignal(number) is before


def test_only_a_second_ctrl_c_ends_at_once():
    """SIGTERM is sent more than once by some schedulers, and must not cut the orderly stop short."""
    stop = StopRequest()
    with stop.by_signals():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert stop.number == signal.SIGTERM, "the first signal decides the exit status"


def test_outside_the_main_thread_nothing_changes():
    before = signal.getsignal(signal.SIGTERM)
    seen: list[object] = []

    def run() -> None:
        with StopRequest().by_signals():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [before]
