"""What ends the loop of a driver."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.errors import OutputInUse, Stopped
from pipeline.run.driver import COMMIT_S, FLUSH_S, Driver


def test_a_driver_whose_lease_was_taken_stops_at_once_and_writes_nothing(monkeypatch):
    """Another driver works on the output, and commits what it finds there."""
    driver: Any = Driver.__new__(Driver)
    driver._lease, driver._ledger = SimpleNamespace(lost=True), "/out"
    monkeypatch.setattr(driver, "_flush", pytest.fail)
    with pytest.raises(OutputInUse, match="another driver has taken the lease of /out"):
        driver._stop_if_needed(None)


def test_what_is_finished_is_written_before_an_end_that_workers_have_named(monkeypatch):
    driver: Any = Driver.__new__(Driver)
    driver._lease, driver._stop = SimpleNamespace(lost=False), SimpleNamespace(number=None)
    driver._end = Stopped("the endpoint refuses the key")
    flushed: list[Any] = []
    monkeypatch.setattr(driver, "_flush", flushed.append)
    with pytest.raises(Stopped, match="the endpoint refuses the key"):
        driver._stop_if_needed("stream")
    assert flushed == ["stream"]


def test_ray_job_stop_leaves_the_time_that_a_driver_takes_to_write():
    """Ray kills a job 3 s after `ray job stop`, in the middle of its last commits."""
    for file in ("ray_cluster.yaml", "deploy/kubernetes/base/ray_cluster.yaml"):
        cluster = (Path(__file__).parents[3] / file).read_text()
        (seconds,) = re.findall(r"RAY_JOB_STOP_WAIT_TIME_S(?:=|, value: \")(\d+)", cluster)
        assert float(seconds) > 2 * (FLUSH_S + COMMIT_S)
