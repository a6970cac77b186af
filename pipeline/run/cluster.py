"""Connect to Ray: join the cluster at RAY_ADDRESS, or start one on this machine, without its messages."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from importlib import import_module
from threading import Thread
from typing import TYPE_CHECKING, Any

from blip2_actor.installation import ray_folder, ray_start_remedy
from pipeline.errors import GIVE_TOKEN, RayStartFailed
from pipeline.run.signals import keeping_handlers
from pipeline.storage.secrets import hide_secrets

if TYPE_CHECKING:
    from pipeline.placement.cluster import Cluster


QUIET = (
    "raised in its creation task|retries remaining|infeasible resource requests|Raylet is terminated"
    "|has been marked dead"
)
"""Messages of Ray on the terminal of every driver, which the job says in its own words."""


_worker_level: str | None = None

TOKEN_REFUSED = "ray.exceptions.AuthenticationError"
"""Text in Ray's error when a cluster refuses the token, or got none."""
CONNECT_S = 10.0
"""How long the head of a cluster may take to accept a connection, and to answer."""
HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""How a client of the head begins: the dashboard, which knows HTTP/1 alone, answers in words."""


def set_ray_environment() -> None:
    """Set the environment variables that Ray reads while it is imported; call this before the import.

    The token of a fresh local cluster is only in the environment. Ray would otherwise write it to a file in
    the home directory, and that file changes how later clusters start.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray's core warns about every actor of Ray Data, directly on the terminal and not by Python's logging.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    # A pattern of lines that are not shown.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", QUIET)
    # A thread of Ray Data that outlives a stopped job must not start a cluster of its own.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    if is_cluster():
        return
    # If warnings are errors, those of Ray's processes end them, and those of Ray here end this one.
    rules = os.environ.get("PYTHONWARNINGS", "").split(",")
    if any(rule.startswith("error") for rule in rules):
        os.environ["PYTHONWARNINGS"] = ",".join(rule for rule in rules if not rule.startswith("error"))
        warnings.filterwarnings("default", module=r"ray(\.|$)")
    # With this setting, Ray takes 127.0.0.1 as its address and listens only there, on Linux too.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def choose_log_level(level: str) -> None:
    """Have the workers of jobs log as JSON from this level on, as `--log-level` asks."""
    global _worker_level
    _worker_level = level.upper()


def is_cluster() -> bool:
    """Return whether jobs of this process run on a cluster that it has not started."""
    return bool(os.environ.get("RAY_ADDRESS"))


@contextmanager
def connected(run_id: str = "") -> Iterator[Cluster]:
    """Connect to Ray for the block: by an existing connection, to RAY_ADDRESS, or to a new cluster.

    A connection or a cluster that was made for the block ends with it.

    Args:
        run_id: stored in Ray's metadata of the job, where its processes and the dashboard find it.

    Raises:
        RayStartFailed: Ray does not start, or the cluster cannot be reached.
    """
    import ray
    from ray.job_config import JobConfig

    from pipeline.local_ray.fewer_processes import without_helper_actors, without_idle_processes
    from pipeline.local_ray.worker_imports import OurPackagesFirst
    from pipeline.metrics import RUN_ID
    from pipeline.placement.cluster import look_at_cluster

    address = os.environ.get("RAY_ADDRESS")
    is_connected = ray.is_initialized()
    if not is_connected:
        job_config = JobConfig() if address else OurPackagesFirst()
        job_config.set_metadata(RUN_ID, run_id)
        if _worker_level is not None:
            # For the workers only: as an argument of `ray.init` it would change the log of this process too.
            config = ray.LoggingConfig("JSON", _worker_level, additional_log_standard_attrs=["name"])
            job_config.set_py_logging_config(config)
        quietly = nullcontext() if address else without_idle_processes()
        with _silent_stderr(), quietly, _importing_ray_data():
            start_ray(
                address=address or "local",
                log_to_driver=False,
                logging_level=logging.ERROR,
                job_config=job_config,
                **({} if address else {"include_dashboard": False}),
            )
    try:
        quiet_ray_data()
        with nullcontext() if is_connected or address else without_helper_actors():
            yield look_at_cluster()
    finally:
        if not is_connected:
            ray.shutdown()


def start_ray(**options: Any) -> None:
    """Call `ray.init(**options)`; when it fails, leave none of its processes and say what to do.

    Raises:
        RayStartFailed: Ray does not start, or the cluster at RAY_ADDRESS cannot be reached.
    """
    import ray
    from ray._private import utils

    from pipeline.local_ray.fewer_processes import replaced

    # Ray shows the command line to every user of the cluster, with the passwords of its URIs (Ray 2.60).
    entrypoint = hide_secrets(utils.get_entrypoint_name())
    try:
        _require_listener(os.environ.get("RAY_ADDRESS", ""))
        # Ray's own handlers end the process with status 15, or abort it.
        with keeping_handlers(), replaced(utils, {"get_entrypoint_name": lambda: entrypoint}):
            ray.init(**options)
    except BaseException as error:  # Ray raises many types here, and a bare Exception when it times out.
        _kill_started_processes(error)
        if not isinstance(error, Exception):
            raise  # a signal
        reason = _reason(error)
        address = os.environ.get("RAY_ADDRESS")
        if address and _asks_for_token(error):
            raise RayStartFailed(
                f"the Ray cluster at {address} asks for a token, and got none or a wrong one; {GIVE_TOKEN}"
            ) from error
        if address:
            raise RayStartFailed(
                f"cannot connect to the Ray cluster at {address}: {reason}; start the cluster or correct "
                "RAY_ADDRESS, or unset it to start Ray on this machine"
            ) from error
        raise RayStartFailed(
            f"Ray did not start on this machine: {reason}; {ray_start_remedy(error)}; "
            f"its logs: {log_folder()}"
        ) from error


def log_folder() -> str:
    """Return the folder in which Ray keeps the logs of the processes of this machine."""
    from ray._private import worker

    node = worker._global_node
    return str(ray_folder() / "session_latest/logs") if node is None else node.get_logs_dir_path()


def _require_listener(address: str) -> None:
    """Raise unless the head of a cluster listens at an address; Ray itself tries for two minutes.

    Args:
        address: as in RAY_ADDRESS; "auto" and the like are left to Ray.
    """
    not_the_head = ConnectionError(
        "the job runs as a driver of the cluster, and not through Ray Client or the dashboard, so the "
        "address is that of the head, such as 10.0.0.1:6379 (blip2 submit takes that of the dashboard)"
    )
    if address.startswith(("ray://", "http://", "https://")):
        raise not_the_head
    host, _, port = address.rpartition(":")
    if host and port.isdecimal():
        try:
            connection = socket.create_connection((host.strip("[]"), int(port)), CONNECT_S)
        except OSError as error:
            raise ConnectionError(f"nothing listens there ({error})") from error
        answer = b""
        with connection, suppress(OSError):
            connection.sendall(HTTP2)
            answer = connection.recv(5)
        if answer == b"HTTP/":
            raise not_the_head


def _asks_for_token(error: BaseException) -> bool:
    """Return whether a cluster has refused the token; only the text of a cause says so (Ray 2.60)."""
    return any(TOKEN_REFUSED in str(cause) for cause in (error, error.__cause__))


def _reason(error: BaseException) -> str:
    """Return the first line of an error of Ray; the whole text if two versions differ."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and lines[0].startswith("Version mismatch"):
        return " ".join(lines)
    return (lines[0] if lines else "").rstrip(".") or type(error).__name__


def _kill_started_processes(error: BaseException) -> None:
    """Kill what a failed `ray.init` has started.

    Ray keeps no reference to a node whose constructor has raised, so that `ray.shutdown` cannot end its
    processes. They would run until this process ends. The node is still in the traceback. A raylet ends its
    agents only if it has the time to end in good order, so the agents are killed here.
    """
    import psutil
    import ray
    from ray._private.node import Node

    ray.shutdown()
    trace = error.__traceback__
    while trace is not None:
        node = trace.tb_frame.f_locals.get("self")
        if isinstance(node, Node):
            agents: list[psutil.Process] = []
            for started in node.all_processes.values():
                for info in started:
                    with suppress(psutil.NoSuchProcess):
                        agents += psutil.Process(info.process.pid).children(recursive=True)
            node.kill_all_processes(check_alive=False, allow_graceful=True, wait=True)
            for agent in agents:
                with suppress(psutil.NoSuchProcess):
                    agent.kill()
            return
        trace = trace.tb_next


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Drop what Ray's core writes to the terminal while it starts; its errors are raised."""
    sys.stderr.flush()
    kept = os.dup(2)
    nothing = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


@contextmanager
def _importing_ray_data() -> Iterator[None]:
    """Import Ray Data in a thread during the block, which mostly waits for Ray's processes."""
    importing = Thread(target=import_module, args=("ray.data",), daemon=True)
    importing.start()
    try:
        yield
    finally:
        importing.join()


def quiet_ray_data() -> None:
    """Keep Ray Data's plans, progress bars and tracebacks off the terminal; they are in its own log file."""
    import ray

    ray.data.DataContext.get_current().enable_progress_bars = False
    for handler in logging.getLogger("ray.data").handlers:
        if not isinstance(handler, logging.FileHandler) and isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.CRITICAL)
