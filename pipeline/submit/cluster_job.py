"""A job on a cluster: begin it or find the one that runs, follow its log, and learn how it has ended."""

from __future__ import annotations

import asyncio
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from blip2_actor.flags import split_uri
from pipeline.errors import GIVE_TOKEN, RayStartFailed, Stopped
from pipeline.submit.job_command import JobCommand
from pipeline.submit.package import Package

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

CONNECT_S = 10.0
STOP_WAIT_S = 30
"""How long `ray job stop` waits before it kills the driver, which needs about ten seconds to write what is
finished. Ray's default is three."""
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
POLL_S = 1.0
LOST_AFTER_S = 60.0
"""How long a connection that breaks is tried again."""


def connect(address: str) -> JobSubmissionClient:
    """Return a client of the cluster; raise RayStartFailed if it cannot be reached."""
    from ray.job_submission import JobSubmissionClient

    parts = split_uri("address", address)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), CONNECT_S).close()
        return JobSubmissionClient(address)
    except _errors() as error:
        remedy = _remedy(error, "start the cluster, keep `ray dashboard` open, or correct --address")
        raise RayStartFailed(
            f"cannot reach the dashboard of a Ray cluster at {address}: {_cause(error)}; {remedy}"
        ) from error


def running_job(client: JobSubmissionClient, command: JobCommand) -> JobDetails | None:
    """Return the job that works on the output of a command, or None.

    Raises:
        RayStartFailed: the cluster does not say.
    """
    with _refusals("listed its jobs"):
        jobs = [job for job in client.list_jobs() if _attempt(job.submission_id, command)]
    return next((job for job in jobs if job.status.value not in ENDED), None)


def begin(client: JobSubmissionClient, command: JobCommand, package: Package) -> str:
    """Submit a command, and return the id of its job: that of its output, with the number of the attempt.

    Raises:
        RayStartFailed: the cluster does not take the job.
    """
    with _refusals("taken the job"):
        number = 1 + max((_attempt(job.submission_id, command) for job in client.list_jobs()), default=0)
        submission_id = command.submission_id if number == 1 else f"{command.submission_id}-{number}"
        return client.submit_job(
            entrypoint=command.entrypoint,
            submission_id=submission_id,
            runtime_env={
                "working_dir": str(package.folder),
                "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)},
            },
            metadata={"output": command.output},
        )


def _attempt(submission_id: str | None, command: JobCommand) -> int:
    """Return the number of an attempt, by the id of its job; 0 for a job on another output."""
    found = re.fullmatch(rf"{re.escape(command.submission_id)}(?:-(\d+))?", submission_id or "")
    return 0 if found is None else int(found[1] or 1)


@contextmanager
def _refusals(what: str) -> Iterator[None]:
    """Turn what Ray's client raises in this block into RayStartFailed.

    Args:
        what: what the cluster has not done.
    """
    try:
        yield
    except _errors() as error:
        remedy = _remedy(error, "look at its dashboard, and run the same command again")
        raise RayStartFailed(f"the Ray cluster has not {what}: {_cause(error)}; {remedy}") from error


def _errors() -> tuple[type[Exception], ...]:
    """Return what Ray's client raises when a request fails, or the connection that sends a log."""
    from aiohttp import ClientError
    from ray.exceptions import AuthenticationError

    return OSError, RuntimeError, ClientError, AuthenticationError


def _remedy(error: Exception, otherwise: str) -> str:
    from ray.exceptions import AuthenticationError

    return GIVE_TOKEN if isinstance(error, AuthenticationError) else otherwise


def follow(client: JobSubmissionClient, submission_id: str, write: Callable[[str], object]) -> JobDetails:
    """Write the log of a job as it grows, until the job has ended; return how.

    Raises:
        Stopped: the cluster can no longer be reached.
    """
    log = _Log(write)
    lost_at: float | None = None
    while True:
        try:
            asyncio.run(log.tail(client, submission_id))
            job = client.get_job_info(submission_id)
            lost_at = None
            if job.status.value in ENDED:
                return job
        except _errors() as error:
            lost_at = lost_at or time.monotonic()
            if time.monotonic() - lost_at > LOST_AFTER_S:
                raise Stopped(
                    f"the cluster can no longer be reached: {_cause(error)}; the job may go on; the "
                    "same command follows it again"
                ) from error
        time.sleep(POLL_S)


class _Log:
    """The log of a job, which each connection sends from its beginning; each part is written once."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write = write
        self._num_written = 0

    async def tail(self, client: JobSubmissionClient, submission_id: str) -> None:
        """Write what comes until the job ends or the connection does."""
        seen = 0
        async for text in client.tail_job_logs(submission_id):
            new = text[max(0, self._num_written - seen) :]
            seen += len(text)
            if new:
                self._write(new)
                self._num_written = seen


def _cause(error: Exception) -> str:
    """Return what an error says in one line: of a traceback that the cluster has sent, the last one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" .")]
    lines = lines or [type(error).__name__]
    return lines[-1 if "Traceback" in lines[0] else 0].rstrip(".")
