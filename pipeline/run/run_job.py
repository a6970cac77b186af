"""Run a prepared job: take the lease, sweep, drive what is left, reconcile."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from blip2_actor import DecodePool
from pipeline.attempts.recorder import AttemptRecorder, recorded
from pipeline.ledger.lease import Lease
from pipeline.ledger.ledger import Ledger
from pipeline.ledger.reconcile import Reconciliation
from pipeline.ledger.retry import describe_work
from pipeline.ledger.shard_progress import ShardProgress
from pipeline.progress import LOG_EVERY_S, Console, count
from pipeline.run.cluster import connected, hold_device
from pipeline.run.driver import Driver
from pipeline.run.job import Job
from pipeline.run.signals import StopRequest
from pipeline.settings.placement import ClusterSize, fit, reserve
from pipeline.stages.device_health import DeviceLeftOut
from pipeline.stages.storage_trouble import WorkerTrouble, describe
from pipeline.storage.retrying import Trouble, listen


def run_job(job: Job, console: Console) -> Reconciliation:
    """Run what is left of a job and reconcile.

    From here on requests to the output are retried, except those of the lease.

    Raises:
        OutputInUse: another driver works on this output.
        Stopped: a signal has stopped the run, or most rows fail; finished work is kept.
        Interrupted: a signal has come before the first row was read, or a second Ctrl-C.
        RayStartFailed: Ray could not be started.
    """
    stop = StopRequest(job.stop_at)
    with (
        stop.by_signals(),
        _said_to(console, stop),
        Lease(job.ledger.folder) as lease,
        recorded(job.ledger.folder, **_known_at_the_start(job)) as attempt,
    ):
        ledger = job.ledger.with_retries()
        if job.is_new:
            ledger.begin(job.run)
        elif job.is_revised:
            ledger.revise(job.run, job.redone)
        ledger.sweep(job.run, job.metadata, job.empty_schema)
        left = _left(job, ledger)
        _announce(job, console, len(left))
        if job.is_retry:
            console.say(describe_work(left, job.choice))
        if left:
            attempt.end_phase("open the output")
            with connected() as cluster:
                attempt.connected()
                _drive(job, ledger, left, cluster, lease, stop, console, attempt)
        ledger.sweep(job.run, job.metadata, job.empty_schema)
        state = ledger.scan()
        ledger.drop_markers(job.run, state)
        done = ledger.reconcile(job.run, state)
        status = done.exit_status(job.settings.max_failed_fraction, job.settings.max_flagged_fraction)
        attempt.end(status, "all shards are finished" if not done.missing else "shards are missing")
        return done


def _known_at_the_start(job: Job) -> dict[str, Any]:
    return {
        "run": job.run.fingerprint.digest,
        "is_retry": job.is_retry,
        "model": job.info.model,
        "dtype": job.info.dtype,
    }


def _drive(
    job: Job,
    ledger: Ledger,
    left: list[ShardProgress],
    cluster: ClusterSize,
    lease: Lease,
    stop: StopRequest,
    console: Console,
    attempt: AttemptRecorder,
) -> None:
    """Drive what is left. When an accelerator is broken, go on with the others."""
    held = []
    while left:
        try:
            Driver(job, ledger, left, cluster, lease, stop, console, attempt).run()
            return
        except DeviceLeftOut as error:
            num_gpus = cluster.num_gpus - len(error.device.ids)
            if not error.device.ids or num_gpus < reserve(job.settings.placement, cluster).caption_gpus:
                raise
            held += hold_device(error.device)
            console.say(f"{error.device} is left out; the job goes on with {num_gpus:g} others")
            cluster = dataclasses.replace(cluster, num_gpus=num_gpus)
            placement = fit(job.settings.placement, cluster)
            job = dataclasses.replace(job, settings=dataclasses.replace(job.settings, placement=placement))
            left = _left(job, ledger)
            attempt.begin_driver()


@contextmanager
def _said_to(console: Console, stop: StopRequest) -> Iterator[None]:
    """Say when requests of the driver itself fail, and give them up after a signal."""
    said = 0.0

    def say(trouble: Trouble | None) -> bool:
        nonlocal said
        phrase = None if trouble is None else describe([WorkerTrouble(trouble, 0)])
        if phrase and time.monotonic() - said >= LOG_EVERY_S:
            said = time.monotonic()
            console.say(phrase)
        return stop.number is None

    listen(say)
    try:
        yield
    finally:
        listen(None)


def _left(job: Job, ledger: Ledger) -> list[ShardProgress]:
    """Return the shards with rows to read or to caption."""
    state = ledger.scan()
    found = ledger.to_retry(job.run, state, job.choice) if job.is_retry else ledger.unfinished(job.run, state)
    return [progress for progress in found if not progress.is_complete]


def _announce(job: Job, console: Console, num_left: int) -> None:
    total = len(job.run.shards)
    console.say(
        f"{job.info.model} ({job.info.dtype}, {job.info.image_size_px} px): {count(total, 'shard')}"
        + (f", {num_left:,} of them to do" if num_left < total else "")
        + f", output in {job.ledger}"
    )
    if job.info.caveat:
        console.say(f"note: {job.info.caveat}")
    if job.info.generation_config:
        listed = ", ".join(f"{name}={value}" for name, value in job.info.generation_config.items())
        console.say(f"from the checkpoint's generation_config.json, if not given: {listed}")
    for note in job.notes:
        console.say(note)
    if num_left:
        with DecodePool(job.info.image_size_px) as pool:
            console.say(str(pool.sandbox_report()))
