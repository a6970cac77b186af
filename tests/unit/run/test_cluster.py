"""What a person reads when Ray does not start; Ray's own errors have many types and many lines."""

from __future__ import annotations

import pytest
import ray

from pipeline.errors import RayStartFailed
from pipeline.run.cluster import connected, start_ray


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch):
    """Make `ray.init` raise, and `ray.shutdown` do nothing, as there is nothing to end."""

    def fail(error: Exception) -> None:
        def init(**_: object) -> None:
            raise error

        monkeypatch.setattr(ray, "is_initialized", lambda: False)
        monkeypatch.setattr(ray, "init", init)
        monkeypatch.setattr(ray, "shutdown", lambda: None)

    return fail


@pytest.mark.parametrize("kind", [Exception, RuntimeError, ConnectionError, ValueError])
def test_a_local_ray_that_does_not_start_says_what_to_do(failing, monkeypatch, kind):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    failing(kind("The current node timed out.\nMore lines."))
    with pytest.raises(RayStartFailed) as refusal, connected():
        pass
    said = str(refusal.value)
    assert said.startswith("Ray did not start on this machine: The current node timed out; when the machine")
    assert said.endswith("run the same command again")


def test_a_cluster_that_cannot_be_reached_is_named(failing, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    failing(ConnectionError("Failed to connect to Ray cluster at head:6379"))
    with pytest.raises(RayStartFailed, match=r"^cannot connect to .* at head:6379: Failed .* unset"):
        start_ray()


def test_an_error_without_a_text_is_named_by_its_type(failing, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    failing(TimeoutError())
    with pytest.raises(RayStartFailed, match="on this machine: TimeoutError; "):
        start_ray()
