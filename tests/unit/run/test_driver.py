"""The events that end the loop of a driver."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.errors import OutputInUse, Stopped
from pipeline.ledger.lease import Lease
from pipeline.run.driver import COMMIT_S, FLUSH_S, Driver
from pipeline.storage.folder import Folder


def test_a_driver_whose_lease_was_taken_stops_at_once_and_writes_nothing(monkeypatch):
    """Another driver works on the output, and commits what it finds there."""
    driver: Any = Driver.__new__(Driver)
    driver._lease = Lease(Folder("/out"))
    driver._lease.lost = True
    monkeypatch.setattr(driver, "_flush", pytest.fail)
    with pytest.raises(OutputInUse, match="another driver has taken the lease of /out"):
        driver._stop_if_needed(None)


@pytest.mark.parametrize("is_certain", [True, False])
def test_no_commit_begins_while_another_driver_may_have_the_lease(is_certain):
    """A suspended driver used to begin commits before its next heartbeat noticed the lost lease."""
    driver: Any = Driver.__new__(Driver)
    driver._lease = SimpleNamespace(is_certain=is_certain)
    driver._tracker = SimpleNamespace(take_complete=lambda: ["report"])
    begun: list[Any] = []
    driver._committers = SimpleNamespace(start=begun.append, collect=lambda _: None, are_behind=False)
    driver._commit()
    assert begun == (["report"] if is_certain else [])


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
    """Ray kills a job 3 s after `ray job stop`, which may be during its last commits."""
    for file in ("ray_cluster.yaml", "deploy/kubernetes/base/ray_cluster.yaml"):
        cluster = (Path(__file__).parents[3] / file).read_text()
        (seconds,) = re.findall(r"RAY_JOB_STOP_WAIT_TIME_S(?:=|, value: \")(\d+)", cluster)
        assert float(seconds) > 2 * (FLUSH_S + COMMIT_S)
