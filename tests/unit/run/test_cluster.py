"""What a person reads when Ray does not start; Ray's own errors have many types and many lines."""

from __future__ import annotations

import errno
import os
import socket
import warnings

import pytest
import ray

from pipeline.errors import RayStartFailed
from pipeline.run.cluster import connected, set_ray_environment, start_ray


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
    assert "run the same command again; its logs: " in said and said.endswith("/logs")


FOLDER = "it keeps its files in /somewhere/ray; set RAY_TMPDIR to "
MACHINE = "when the machine is busy or short of memory or disk space, wait or free some"


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (PermissionError(errno.EACCES, "Permission denied"), FOLDER),
        (OSError(errno.EROFS, "Read-only file system"), FOLDER),
        (OSError("AF_UNIX path length cannot exceed 107 bytes"), FOLDER),
        (UnicodeEncodeError("ascii", "/tmp/\xe9", 5, 6, "ordinal not in range(128)"), FOLDER),
        (OSError(errno.ENOSPC, "No space left on device"), MACHINE),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/usr/lib/raylet"), MACHINE),
        (OSError("Failed to start the dashboard"), MACHINE),
    ],
    ids=["denied", "read-only", "too long", "not ASCII", "full", "a program is missing", "another reason"],
)
def test_the_folder_of_ray_is_named_if_it_cannot_be_used(failing, monkeypatch, error, remedy):
    """The remedy was to wait until the machine has memory, and the logs were said to be in /tmp."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", "/somewhere")
    failing(error)
    with pytest.raises(RayStartFailed, match=f"; {remedy}"):
        start_ray()


def test_a_cluster_that_cannot_be_reached_is_named(failing, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    monkeypatch.setattr(socket, "create_connection", lambda *_: socket.socket())
    failing(ConnectionError("Failed to connect to Ray cluster at head:6379"))
    with pytest.raises(RayStartFailed, match=r"^cannot connect to .* at head:6379: Failed .* unset"):
        start_ray()


def test_a_cluster_that_refuses_the_token_is_not_said_to_be_gone(failing, monkeypatch):
    """The remedy was to start the cluster, which runs."""
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    monkeypatch.setattr(socket, "create_connection", lambda *_: socket.socket())
    error = ConnectionError("Failed to connect to Ray cluster at head:6379")
    error.__cause__ = RuntimeError(
        "Traceback\nray.exceptions.AuthenticationError: RPC error: InvalidAuthToken"
    )
    failing(error)
    with pytest.raises(
        RayStartFailed, match=r"^the Ray cluster at head:6379 asks .*RAY_AUTH_MODE=token, and"
    ):
        start_ray()


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("ray://head:10001", "at ray://head:10001: the job runs as a driver of the cluster, and not through"),
        ("http://head:8265", r"through Ray Client or the dashboard, .* that of the dashboard\); start"),
        ("127.0.0.1:1", r"at 127.0.0.1:1: nothing listens there \(.*refused\); start the cluster"),
    ],
)
def test_an_address_that_cannot_work_is_refused_at_once(address, said, failing, monkeypatch):
    """A dead address took two minutes, and ray:// failed in Ray Data with a traceback."""
    monkeypatch.setenv("RAY_ADDRESS", address)
    failing(AssertionError("Ray must not be asked"))
    with pytest.raises(RayStartFailed, match=said):
        start_ray()


def test_the_port_of_the_dashboard_is_refused_at_once(failing, monkeypatch):
    """Ray tried for minutes, and nothing was printed."""
    ours, dashboard = socket.socketpair()
    dashboard.sendall(b"HTTP/1.0 400 Bad Request\r\n")
    monkeypatch.setattr(socket, "create_connection", lambda *_: ours)
    monkeypatch.setenv("RAY_ADDRESS", "head:8265")
    failing(AssertionError("Ray must not be asked"))
    with dashboard, pytest.raises(RayStartFailed, match=r"at head:8265: .* is that of the head, such"):
        start_ray()


def test_the_cluster_of_another_python_is_named_with_both_versions(failing, monkeypatch):
    """The sentence ended with "The cluster was started with:"."""
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    ours = "This process on 10.0.0.2 was started with:\n    Ray: 2.60.0\n    Python: 3.11.7\n"
    text = f"Version mismatch: The cluster was started with:\n    Ray: 2.60.0\n    Python: 3.10.1\n{ours}"
    failing(RuntimeError(text))
    with pytest.raises(RayStartFailed, match=r"Python: 3\.10\.1 This process .* Python: 3\.11\.7; start"):
        start_ray()


def test_an_error_without_a_text_is_named_by_its_type(failing, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    failing(TimeoutError())
    with pytest.raises(RayStartFailed, match="on this machine: TimeoutError; "):
        start_ray()


def test_warnings_are_no_errors_for_the_processes_of_ray(monkeypatch):
    """With PYTHONWARNINGS=error its agents ended, and after half a minute the machine was said to be busy."""
    monkeypatch.setattr(os, "environ", {"PYTHONWARNINGS": "error,ignore::DeprecationWarning"})
    with warnings.catch_warnings():
        set_ray_environment()
    assert os.environ["PYTHONWARNINGS"] == "ignore::DeprecationWarning"
