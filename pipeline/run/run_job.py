"""Run a prepared job: take the lease, sweep, drive what is left, reconcile."""

from __future__ import annotations

from pipeline.ledger.lease import Lease
from pipeline.ledger.ledger import Ledger
from pipeline.ledger.reconcile import Reconciliation
from pipeline.ledger.shard_progress import ShardProgress
from pipeline.progress import Console
from pipeline.run.cluster import connected
from pipeline.run.driver import Driver
from pipeline.run.job import Job


def run_job(job: Job, console: Console) -> Reconciliation:
    """Run what is left of a job and reconcile.

    From here on requests to the output are retried, except those of the lease.

    Raises:
        OutputInUse: another driver works on this output.
        Stopped: a signal has stopped the run, or most rows fail; finished work is kept.
        RayStartFailed: Ray could not be started.
    """
    with Lease(job.ledger.folder) as lease:
        ledger = job.ledger.with_retries()
        if job.is_new:
            ledger.begin(job.run)
        ledger.sweep(job.run, job.metadata, job.empty_schema)
        left = _left(job, ledger)
        _announce(job, console, len(left))
        if left:
            with connected() as cluster:
                Driver(job, ledger, left, cluster, lease, console).run()
        ledger.sweep(job.run, job.metadata, job.empty_schema)
        state = ledger.scan()
        ledger.drop_markers(job.run, state)
        return ledger.reconcile(job.run, state)


def _left(job: Job, ledger: Ledger) -> list[ShardProgress]:
    """Return the shards with rows to read or to caption."""
    state = ledger.scan()
    found = ledger.to_retry(job.run, state) if job.is_retry else ledger.unfinished(job.run, state)
    return [progress for progress in found if not progress.is_complete]


def _announce(job: Job, console: Console, num_left: int) -> None:
    total = len(job.run.shards)
    console.say(
        f"{job.info.model} ({job.info.dtype}, {job.info.image_size_px} px): {total:,} shards"
        + (f", {num_left:,} of them to do" if num_left < total else "")
        + f", output in {job.ledger}"
    )
    if job.info.generation_config:
        listed = ", ".join(f"{name}={value}" for name, value in job.info.generation_config.items())
        console.say(f"from the checkpoint's generation_config.json, if not given: {listed}")
