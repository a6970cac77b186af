"""Run a prepared job: take the lease, sweep, drive what is left, reconcile."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from blip2_actor import DecodePool
from pipeline.attempts.recorder import AttemptRecorder, recorded
from pipeline.errors import Stopped
from pipeline.ledger.lease import Lease
from pipeline.ledger.reconcile import Reconciliation
from pipeline.ledger.retry import describe_work
from pipeline.ledger.scan import OutputState, ShardProgress
from pipeline.placement.cluster import Cluster, look_at_cluster
from pipeline.placement.first_worker import ask_first_worker
from pipeline.placement.held_device import hold_device
from pipeline.placement.reservations import fit, reserve
from pipeline.placement.storage_check import check_storage
from pipeline.progress import LOG_EVERY_S, Console, count
from pipeline.report.models import demo_warning
from pipeline.report.pace import total_line
from pipeline.run.cluster import connected
from pipeline.run.job import Job
from pipeline.run.signals import StopRequest
from pipeline.stages.device_health import DeviceLeftOut
from pipeline.stages.storage_trouble import describe
from pipeline.storage.retrying import Trouble, listen
from pipeline.watch.members import Members
from pipeline.watch.view import CAPTIONING, DECODING


def run_job(job: Job, console: Console) -> Reconciliation:
    """Run what is left of a job and reconcile.

    From here on requests to the output are retried, except those of the lease.

    Raises:
        OutputInUse: another driver works on this output, or has changed its run since the job was prepared.
        Stopped: a signal has stopped the run, or most rows fail; finished work is kept.
        Interrupted: a signal has come before the first row was read, or a second Ctrl-C.
        RayStartFailed: Ray could not be started.
        RefusedByCluster: no node has, or will have, what the job needs.
    """
    stop = StopRequest(job.stop_at)
    with (
        stop.by_signals(),
        console.area(),
        _said_to(console, stop),
        Lease(job.ledger.folder, job.run_slice, run=job.run.id) as lease,
        recorded(
            job.ledger.folder,
            is_begun=not job.is_new,
            run=job.run.fingerprint.digest,
            run_id=job.run.id,
            is_retry=job.is_retry,
            model=job.info.model,
            dtype=job.info.dtype,
        ) as attempt,
        _total_said(console, attempt),
        stop.named(),
    ):
        console.keep(attempt.log.add)
        job = dataclasses.replace(job, ledger=job.ledger.with_retries())
        job.ledger.require_unrevised(job.run)
        state = job.ledger.scan()
        left = _left(job, state)
        if left or job.redone or job.asks_worker:
            attempt.end_phase("open the output")
            console.phase("starting Ray")
            with connected(job.run.id) as cluster:
                attempt.connected(cluster)
                console.phase("looking at the cluster")
                job = _place(job, left, cluster, console)
                lease.require()  # This machine may have been suspended meanwhile.
                job, state = _begin(job, state, console, attempt)
                left = _left(job, state)
                _announce(job, console, left)
                _drive(job, left, cluster, lease, stop, console, attempt)
            lease.require()
            state = _sweep(job, job.ledger.scan())
        else:
            job, state = _begin(job, state, console, attempt)
            _announce(job, console, left)
        done = job.ledger.reconcile(job.part, state)
        if job.run_slice is None:
            job.ledger.tidy_summaries(state, done)
            job.ledger.drop_markers(state, done)
        status = done.exit_status(job.settings.max_failed_fraction, job.settings.max_flagged_fraction)
        shards = f"shards{_of_slice(job)}"
        attempt.end(status, f"{shards} are missing" if done.missing else f"all {shards} are finished")
        return done


def _begin_or_join(job: Job) -> Job:
    """Begin a run, or join it if another driver has begun it since the job was prepared.

    Raises:
        FingerprintMismatch: it has other settings.
    """
    begun = job.ledger.load(job.settings.input)
    if begun is None:
        if job.ledger.begin(job.run):
            return job
        begun = job.ledger.require_run(job.settings.input)
    begun.require_same(job.run.fingerprint, job.settings.input, str(job.ledger))
    return job.joining(begun)


def _place(job: Job, left: list[ShardProgress], cluster: Cluster, console: Console) -> Job:
    """Refuse a job that the cluster cannot run, and ask a worker what only workers know.

    Raises:
        RefusedByCluster: no node has, or will have, what the job needs; nothing is written.
    """
    reservations = reserve(job.settings.placement, cluster, job.engine)
    if not cluster.is_local:
        shards = [progress.shard for progress in left] or job.part.shards
        folder = job.ledger.folder.with_retries(0.0)
        check_storage(folder, shards, cluster, reservations.read, console.say)
    if job.asks_worker:
        job = job.with_answer(ask_first_worker(job.engine, reservations, console.say))
    return job


def _begin(
    job: Job, state: OutputState, console: Console, attempt: AttemptRecorder
) -> tuple[Job, OutputState]:
    """Write what this start changes, and commit what is complete.

    Args:
        state: the output when the lease was taken.

    Returns:
        The job with its run, and the output as it is now.
    """
    if job.is_new:
        job = _begin_or_join(job)
    elif job.is_revised:
        job.ledger.revise(job.run, job.redone)
        state = state.without(job.redone)
    attempt.run_has_begun(job.run.fingerprint.digest, job.info.dtype)
    if attempt.earlier.all:
        before = total_line(attempt.earlier)
        console.say(f"attempt {len(attempt.all):,} of run {job.run.id}; before it: {before}")
    return job, _sweep(job, state)


def _sweep(job: Job, state: OutputState) -> OutputState:
    return job.ledger.sweep(job.part, state, job.metadata, job.empty_schema, job.run_slice is not None)


def _drive(
    job: Job,
    left: list[ShardProgress],
    cluster: Cluster,
    lease: Lease,
    stop: StopRequest,
    console: Console,
    attempt: AttemptRecorder,
) -> None:
    """Drive what is left. If an accelerator is broken, go on with the others."""
    from pipeline.run.driver import Driver  # imports Ray Data, which `connected` has done meanwhile

    held: list[Any] = []
    while left:
        num_bytes = _bytes_to_read(job, left)
        reservations = reserve(job.settings.placement, cluster, job.engine, len(left), num_bytes)
        needs = {CAPTIONING: reservations.caption, DECODING: reservations.decode}
        members = Members(console.say, needs, cluster.is_local)
        try:
            Driver(job, left, reservations, lease, stop, console, attempt, members).run()
            return
        except DeviceLeftOut as error:
            resource, ids = error.device.resource, error.device.ids
            cluster = look_at_cluster()
            num_others = cluster.total(resource, reservations.caption.labels) - len(held) - len(ids)
            per_actor = reservations.caption.accelerators.get(resource, 1.0)
            if not ids or num_others < per_actor:
                raise
            held += hold_device(error.device)
            others = count(int(num_others), "other")
            console.warn(f"{error.device} is left out; the job goes on with {others}")
            placement = fit(job.settings.placement, int(num_others / per_actor), cluster)
            job = dataclasses.replace(job, settings=dataclasses.replace(job.settings, placement=placement))
            left = _left(job, job.ledger.scan())
            attempt.begin_driver()


@contextmanager
def _said_to(console: Console, stop: StopRequest) -> Iterator[None]:
    """Say when the driver's own requests fail, and give them up after a signal."""
    said = 0.0

    def say(trouble: Trouble | None) -> bool:
        nonlocal said
        stop.store_fails = trouble is not None
        phrase = None if trouble is None else describe([trouble])
        if phrase and time.monotonic() - said >= LOG_EVERY_S:
            said = time.monotonic()
            console.warn(phrase)
        return stop.number is None

    listen(say)
    try:
        yield
    finally:
        listen(None)


@contextmanager
def _total_said(console: Console, attempt: AttemptRecorder) -> Iterator[None]:
    """Say at the end what all attempts have made, even if this one is stopped: its work is kept."""
    try:
        yield
    except Stopped:
        console.say(total_line(attempt.all))
        raise
    console.say(total_line(attempt.all))


def _left(job: Job, state: OutputState) -> list[ShardProgress]:
    """Return the shards with rows to read or to caption."""
    if job.is_retry:
        # Rows that failed again in an earlier retry are run once more.
        return job.ledger.to_retry(job.part, state, job.choice)
    return [progress for progress in job.ledger.unfinished(job.part, state) if not progress.is_complete]


def _bytes_to_read(job: Job, left: list[ShardProgress]) -> int | None:
    """Return the size of the shards; None if a size is unknown, or the shards only name images."""
    sizes = [progress.shard.size_bytes for progress in left]
    names_images = job.settings.read_options.fetch or any(p.shard.format == "manifest" for p in left)
    return None if names_images or None in sizes else sum(size for size in sizes if size is not None)


def _of_slice(job: Job) -> str:
    return "" if job.run_slice is None else f" of slice {job.run_slice}"


def _announce(job: Job, console: Console, left: list[ShardProgress]) -> None:
    num_left = len(left)
    total = len(job.part.shards)
    console.say(
        f"{job.info.model} ({job.info.dtype}, {job.info.image_size_px} px): "
        f"{count(total, 'shard')}{_of_slice(job)}"
        + (f", {num_left:,} of them to do" if num_left < total else "")
        + f", output in {job.ledger}, run {job.run.id}"
    )
    if job.run.quantization is not None:
        console.say(f"quantized to {job.run.quantization}")
    caveat = demo_warning(job.run)
    if caveat is not None:
        console.warn(caveat)
    if job.info.generation_config:
        listed = ", ".join(f"{name}={value}" for name, value in job.info.generation_config.items())
        console.say(f"from the checkpoint's generation_config.json, if not given: {listed}")
    for note in job.notes:
        console.say(note)
    if num_left:
        with DecodePool(job.info.image_size_px) as pool:
            console.say(str(pool.sandbox_report()))
    if job.is_retry:
        console.say(describe_work(left, job.choice))
