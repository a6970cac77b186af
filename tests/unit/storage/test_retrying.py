"""Retries must outlast a disk that a person frees, and must end."""

import pytest

from pipeline.storage.retrying import retry_on_oserror

FULL = OSError(28, "No space left on device")


class Clock:
    """Time that passes only in `sleep`."""

    def __init__(self) -> None:
        self.now = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def fails(times: int):
    left = iter([FULL] * times)

    def write() -> str:
        error = next(left, None)
        if error is not None:
            raise error
        return "written"

    return write


def test_a_disk_that_is_full_for_a_while_costs_nothing():
    clock = Clock()
    assert retry_on_oserror(fails(5), sleep=clock.sleep, clock=lambda: clock.now) == "written"
    assert clock.now == 0.5 + 1 + 2 + 4 + 8


def test_a_disk_that_stays_full_is_given_up_in_time():
    clock = Clock()
    with pytest.raises(OSError, match="No space"):
        retry_on_oserror(fails(10_000), retry_for_s=60, sleep=clock.sleep, clock=lambda: clock.now)
    assert 30 <= clock.now <= 60


def test_without_retries_nothing_sleeps():
    clock = Clock()
    with pytest.raises(OSError, match="No space"):
        retry_on_oserror(fails(1), retry_for_s=0, sleep=clock.sleep, clock=lambda: clock.now)
    assert clock.now == 0


def test_another_error_is_raised_at_once():
    def wrong() -> None:
        raise ValueError("no storage is to blame")

    clock = Clock()
    with pytest.raises(ValueError, match="no storage"):
        retry_on_oserror(wrong, sleep=clock.sleep, clock=lambda: clock.now)
    assert clock.now == 0
