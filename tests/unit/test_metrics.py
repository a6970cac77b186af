"""The metrics of a job count what they say; a chaos test (`test_job_metrics.py`) scrapes a real job."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from ray.util.metrics import Metric

from pipeline import metrics
from pipeline.stages import storage_trouble
from pipeline.stages.coordinator import Coordinator
from pipeline.stages.device_health import Device
from pipeline.storage import retrying

Recorded = list[tuple[str, float, dict[str, str]]]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """The recorded metrics, which are not sent to Ray's agent."""
    found: Recorded = []

    def record(metric: Metric, value: float, tags: dict[str, str] | None = None) -> None:
        assert {*(tags or {}), metrics.RUN} == set(metric.info["tag_keys"])
        found.append((metric.info["name"], value, tags or {}))

    monkeypatch.setattr(Metric, "_record", record)
    return found


def test_a_worker_reports_its_seconds_in_total_and_each_counts_once(recorded: Recorded) -> None:
    coordinator = Coordinator()
    for worker, busy_s in (("a", 2.0), ("a", 2.0), ("b", 5.0), ("a", 3.5)):
        coordinator.report("decode", worker, busy_s, 10.0)
    busy = [value for name, value, tags in recorded if name == "blip2_stage_busy_seconds"]
    assert busy == [2.0, 5.0, 1.5]
    for _ in range(2):  # Ray drops a gauge that is not set again
        recorded.clear()
        coordinator.news()
        assert recorded == [("blip2_stage_workers", 2, {"stage": "decode"})]


def test_a_call_that_starts_again_and_a_device_that_fails_are_counted(recorded: Recorded) -> None:
    coordinator = Coordinator()
    coordinator.begin_call("call")
    assert not recorded
    coordinator.begin_call("call")
    coordinator.device_failed(Device("node", "host", ()), "no memory", ["call"])
    assert [name for name, _, _ in recorded] == ["blip2_replayed_calls", "blip2_device_failures"]


def test_each_failed_request_to_a_store_counts_once_however_long_the_pause(
    recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: list[Callable[[], int]] = [_fail, _fail, _fail, lambda: 7]
    monkeypatch.setattr(storage_trouble.ray, "get", lambda *_, **__: True)
    clock = iter(range(1000))
    storage_trouble.tell_coordinator(_NoActor())
    try:
        result = retrying.retry_on_oserror(
            lambda: answers.pop(0)(), place="input", sleep=lambda _: None, clock=lambda: next(clock) / 4
        )
    finally:
        retrying.listen(None)
    assert result == 7
    assert recorded == [("blip2_store_retries", 1, {"place": "input"})] * 3


def test_only_what_has_ended_well_is_timed(recorded: Recorded) -> None:
    with metrics.timed(metrics.COMMIT_S):
        pass
    with pytest.raises(OSError), metrics.timed(metrics.COMMIT_S):
        _fail()
    assert [name for name, _, _ in recorded] == ["blip2_commit_seconds"]


def _fail() -> int:
    raise OSError("the store is away")


class _NoActor:
    """Stands for the coordinator's handle; nothing is sent."""

    def __getattr__(self, name: str) -> _NoActor:
        return self

    def __call__(self, *_: object) -> None:
        pass

    remote = __call__
