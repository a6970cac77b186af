"""A device that hangs or fails: judged too early, it costs an accelerator; too late, the whole job."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from types import SimpleNamespace
from typing import Any

import pyarrow as pa

from blip2_actor import EngineStats
from pipeline.stages import write
from pipeline.stages.coordinator import MAX_DEATHS_ALONE, Coordinator
from pipeline.stages.device_health import Device, Watchdog
from pipeline.stages.receipts import Receipt

GPU = Device("node", "host", ("3",))
OTHER = Device("node", "host", ("4",))


def test_an_engine_that_has_work_and_makes_no_progress_hangs():
    now, said = [0.0], list[str]()
    stats = [EngineStats(num_finished=1, num_waiting=1)]
    watchdog = Watchdog(lambda: stats, 10.0, said.append, lambda: now[0])
    for now[0] in (0.0, 9.0):
        watchdog.check()
    stats[:] = [EngineStats(num_finished=1, num_decode_steps=1, num_running=1)]
    for now[0] in (10.0, 19.0):
        watchdog.check()
    stats[:] = [EngineStats(num_finished=2, num_decode_steps=1)]
    for now[0] in (20.0, 99.0):  # it has nothing to do
        watchdog.check()
    assert said == []
    stats[:] = [EngineStats(num_finished=2, num_decode_steps=1, num_waiting=1)]
    for now[0] in (100.0, 111.0):
        watchdog.check()
    assert said == ["no progress for 12 s"]


def test_the_first_result_may_take_longer_because_the_model_is_compiled():
    now, said = [0.0], list[str]()
    watchdog = Watchdog(lambda: [EngineStats(num_waiting=1)], 10.0, said.append, lambda: now[0])
    for now[0] in (0.0, 29.0):
        watchdog.check()
    assert said == []
    now[0] = 31.0
    watchdog.check()
    assert said == ["no progress for 31 s"]


def fail(coordinator: Coordinator, step: Sequence[int] = (), device: Device = GPU) -> list[bool]:
    """Let a process fail in a call; return whether each new failure is the last one."""
    coordinator.begin_call("call")
    if step:
        coordinator.begin_step("call", step)
    coordinator.device_failed(device, "no progress", ["call"])
    return [failure.is_last for failure in coordinator.news().failures]


def test_a_device_that_fails_with_any_image_is_left_out_before_an_image_is_blamed():
    coordinator = Coordinator()
    assert fail(coordinator) == [False]
    assert fail(coordinator, range(32)) == [], "the call that the first failure has interrupted"
    assert fail(coordinator, [0]) == [False]
    assert coordinator.begin_call("call").deaths_alone[0] < MAX_DEATHS_ALONE
    assert fail(coordinator, [1]) == [True]


def test_an_image_that_breaks_every_device_is_no_reason_to_leave_one_out():
    coordinator = Coordinator()
    assert fail(coordinator) == [False]
    fail(coordinator, range(32))
    for _ in range(2):
        assert fail(coordinator, [0]) == [False]
    assert coordinator.begin_call("call").deaths_alone[0] == MAX_DEATHS_ALONE


def test_a_failure_that_several_calls_meet_counts_once(monkeypatch):
    """An engine that failed once under eight calls used to be excluded as if it had failed eight times."""
    coordinator = Coordinator()
    has_exited = threading.Event()
    stage: Any = write.WriteStage.__new__(write.WriteStage)
    stage._giving_up, stage._device, stage._calls = threading.Semaphore(), GPU, {"a", "b"}
    stage._coordinator = SimpleNamespace(device_failed=SimpleNamespace(remote=coordinator.device_failed))
    monkeypatch.setattr(write.ray, "get", lambda answer, timeout: answer)
    monkeypatch.setattr(write.os, "_exit", lambda status: has_exited.set())
    with ThreadPoolExecutor() as threads:
        calls = [threads.submit(stage._give_up, "no progress") for _ in range(3)]
        has_exited.wait(10)
        wait(calls, 0.1)
        failures = coordinator.news().failures
        stage._giving_up.release(2)  # the process would end, with its threads
    assert [failure.number for failure in failures] == [1]


def test_a_row_that_was_captioned_shows_that_the_device_works():
    coordinator = Coordinator()
    ok, failed = ("ok", 1), ("failed", 1)
    for by_status, is_last in (((ok,), False), ((failed, ok), False), ((failed,), True)):
        for _ in range(2):
            fail(coordinator)
        coordinator.wrote("call", [(5, 6)], [Receipt("s", ((5, 6),), by_status)], GPU)
        assert fail(coordinator) == [is_last]
        assert fail(coordinator, device=OTHER) == [False]
        coordinator.wrote("call", [(7, 8)], [Receipt("s", ((7, 8),), (("ok", 1),))], GPU)
        coordinator.wrote("call", [(7, 8)], [Receipt("s", ((7, 8),), (("ok", 1),))], OTHER)


def test_a_worker_says_with_every_piece_how_busy_it_is(monkeypatch):
    """A call may take as long as the run: the terminal used to have no figure for the busiest stage."""
    coordinator, busy_s = Coordinator(), list[float]()
    engine: Any = SimpleNamespace(busy_s=0.0)

    class Handle:
        def __getattr__(self, name: str) -> SimpleNamespace:
            return SimpleNamespace(remote=getattr(coordinator, name))

    def pieces(*_):
        for made in (1.0, 2.0):
            engine.busy_s = made
            yield [(0, None)]
            busy_s.append(coordinator.news().loads["caption"]["worker"].busy_s)

    stage = write.WriteStage.__new__(write.WriteStage)
    stage._coordinator, stage._device, stage._worker, stage._started = Handle(), GPU, "worker", 0.0
    stage._stage = stage._writer = engine
    monkeypatch.setattr(write.ray, "get", lambda answer: answer)
    monkeypatch.setattr(stage, "_finish_rows", pieces)
    monkeypatch.setattr(stage, "_write", lambda *_: [])
    assert stage._run("call", pa.table({})) == []
    assert busy_s == [1.0, 2.0]
