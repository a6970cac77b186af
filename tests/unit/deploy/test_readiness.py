"""Readiness follows the controller's records, asks it rarely, and keeps its answer while it is silent."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace

import pytest
from ray import _raylet, serve

from deploy import readiness
from deploy.http.errors import ApiError
from deploy.readiness import Readiness

DEPLOYMENTS = ("Captioner", "Captioner_other")


def records(status: str, **replicas: int) -> SimpleNamespace:
    engines = SimpleNamespace(status=status, replica_states=replicas)
    others = SimpleNamespace(status="UNHEALTHY", replica_states={})
    deployments = {"Captioner": others, "Captioner_other": engines}
    return SimpleNamespace(applications={"app": SimpleNamespace(deployments=deployments)})


@pytest.mark.parametrize(
    ("found", "is_ready"),
    [
        (records("HEALTHY", RUNNING=1), True),
        (records("UNHEALTHY", RUNNING=1, STARTING=1), True),
        (records("HEALTHY"), True),  # scaled to zero: a request starts one
        (records("UNHEALTHY", STARTING=1), False),
        (records("UPDATING", STARTING=1), False),
        (SimpleNamespace(applications={}), False),
    ],
)
def test_ready_while_an_engine_runs_or_none_is_needed(
    monkeypatch: pytest.MonkeyPatch, found: SimpleNamespace, is_ready: bool
) -> None:
    asked_for: list[object] = []

    def status() -> SimpleNamespace:
        asked_for.append(_raylet.async_task_id.get())  # type: ignore[attr-defined]
        return found

    monkeypatch.setattr(serve, "status", status)

    async def run() -> None:
        _raylet.async_task_id.set("the first probe")  # type: ignore[attr-defined]
        probe = Readiness("app", DEPLOYMENTS)
        await probe.check()  # an engine has just answered
        probe._known_at_s -= 10
        for _ in range(20):
            try:
                await probe.check()
            except ApiError as error:
                assert (error.code, error.type, is_ready) == (503, "not_ready", False)
            else:
                assert is_ready

    asyncio.run(run())
    assert asked_for == [None], "asked once, and not by a call that ends with the first probe"


def test_a_silent_controller_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    may_answer = threading.Event()

    def status() -> SimpleNamespace:
        may_answer.wait(10)
        return records("UNHEALTHY")

    monkeypatch.setattr(readiness, "ANSWER_WITHIN_S", 0.02)
    monkeypatch.setattr(serve, "status", status)

    async def run() -> None:
        probe = Readiness("app", DEPLOYMENTS)
        probe._known_at_s -= 10
        for _ in range(3):
            await probe.check()
        may_answer.set()
        assert probe._asking is not None
        await probe._asking
        with pytest.raises(ApiError):
            await probe.check()

    asyncio.run(run())
