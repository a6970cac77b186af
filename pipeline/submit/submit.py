"""The command `blip2 submit`: send a command to a cluster as a job, and end as the job ends."""

from __future__ import annotations

import os

from pipeline.errors import Interrupted, OutputInUse
from pipeline.exit_status import ExitStatus, before_work, errors_to_exit_status
from pipeline.progress import Console, count, format_bytes
from pipeline.storage.secrets import hide_secrets
from pipeline.submit.cluster_job import begin, connect, follow, running_job
from pipeline.submit.job_command import JobCommand, check_command
from pipeline.submit.package import PACKAGES, packed
from pipeline.submit.settings import SubmitSettings, require_dashboard

ADDRESS = "RAY_API_SERVER_ADDRESS"
"""The environment variable in which Ray's own commands look."""


@errors_to_exit_status
def submit(settings: SubmitSettings) -> int:
    """Submit a job, or find the one that works on its output already; follow its log, and end as it ends."""
    console = Console()
    with before_work(settings.job_settings):
        command = check_command(settings.job, settings.job_flags)
    with before_work(type(settings)):
        address = settings.address or os.environ.get(ADDRESS)
        if not address:
            raise ValueError(f"address must be given, or {ADDRESS} set, such as http://127.0.0.1:8265")
        require_dashboard(ADDRESS, address)  # that of the flag has been checked
    client = connect(address)
    running = running_job(client, command)
    if running is not None:
        submission_id = str(running.submission_id)
        if running.entrypoint != command.entrypoint:
            raise OutputInUse(
                f"the job {submission_id} works on {command.output} already, with another command: "
                f"{hide_secrets(str(running.entrypoint))}; wait for it, or stop it with "
                f"ray job stop {submission_id}"
            )
        console.say(f"the job {submission_id} runs already; its log from the beginning:")
    else:
        with packed() as package:
            size = f"{count(package.num_files, 'file')}, {format_bytes(package.num_bytes)}"
            console.say(f"sending {' and '.join(PACKAGES)}: {size}")
            submission_id = begin(client, command, package)
        say = console.result if settings.no_wait else console.say
        say(f"submitted the job {submission_id}: {command.entrypoint}")
    console.event("submitted", submission_id=submission_id, address=address)
    console.say(f"to stop it: ray job stop --address {address} {submission_id}")
    if settings.no_wait:
        return ExitStatus.DONE
    try:
        job = follow(client, submission_id, console.stream_log)
    except Interrupted:
        console.say(f"the job {submission_id} goes on; the same command follows its log again")
        raise
    return _end(job.status.value, job.driver_exit_code, command, submission_id, console)


def _end(
    status: str, exit_code: int | None, command: JobCommand, submission_id: str, console: Console
) -> int:
    """Say how a job has ended, and return the exit status of the command: that of the job, if it has one."""
    if status == "STOPPED":
        console.warn(
            f"the job {submission_id} was stopped; what it has finished is kept in {command.output}, and the "
            "same command goes on from there"
        )
        ended: int = ExitStatus.TERMINATED
    else:
        own = ExitStatus.DONE if status == "SUCCEEDED" else exit_code
        console.say(f"the job {submission_id} has ended with exit status {'unknown' if own is None else own}")
        ended = ExitStatus.FAILED if own is None or own < 0 else own
    console.event("end", submission_id=submission_id, exit_status=ended)
    return ended
