"""`Driver`: the loop that takes receipts, commits complete shards, shows progress and reacts to signals."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray

from pipeline.errors import OutputInUse, Stopped, StoppedBySignal, TooManyFailures
from pipeline.ledger.lease import Lease
from pipeline.ledger.ledger import Ledger
from pipeline.ledger.shard_progress import ShardProgress
from pipeline.progress import Console, ProgressSnapshot, Rate
from pipeline.run.bottleneck import busy_fractions, describe_bottleneck
from pipeline.run.committers import Committers
from pipeline.run.job import Job
from pipeline.run.signals import StopRequest
from pipeline.run.stream import ReceiptStream, receipts_dataset
from pipeline.run.tracker import Tracker
from pipeline.settings.placement import ClusterSize
from pipeline.stages.coordinator import Coordinator

STEP_S = 0.2
"""How long one step waits for receipts."""
CHECK_EVERY_S = 1.0
"""Seconds between two visits to the coordinator and to the shard reports."""
FLUSH_S = 20.0
"""How long running calls may write finished rows after a signal; a preempted machine has 30 s."""


class Driver:
    """The main loop of a run: it drives what is left of a job, in the main thread, on a connected Ray.

    The run ends early in one of four ways:

    - SIGTERM, or the first SIGINT (Ctrl-C): running calls write the rows they have finished (for at most
      `FLUSH_S`), complete shards are committed, and `StoppedBySignal` is raised. A second SIGINT ends the
      process at once.
    - Most rows fail: the same, with `TooManyFailures`.
    - Ray gives up on a stage or a commit: what can be committed is, and `Stopped` names the cause.
    - Another driver has taken the lease: `OutputInUse` is raised at once.

    In each case finished work stays in the output, and the same command resumes it.
    """

    def __init__(
        self,
        job: Job,
        ledger: Ledger,
        left: Sequence[ShardProgress],
        cluster: ClusterSize,
        lease: Lease,
        console: Console,
    ) -> None:
        """Start the actors that are not stages.

        Args:
            ledger: the output of the job, with retries: for work that must not be lost.
            left: the shards with rows to do.
            lease: its heartbeats carry the progress from now on.
        """
        self._job = job
        self._ledger = ledger
        self._lease = lease
        self._console = console
        self._work = [progress.work for progress in left]
        self._tracker = Tracker(left)
        self._cluster = cluster
        self._coordinator: Any = (
            ray.remote(Coordinator).options(num_cpus=0, max_restarts=-1, max_task_retries=-1).remote()
        )
        self._committers = Committers(ledger, job.metadata, job.empty_schema, cluster)
        # A retry runs rows that have failed before: most of them may well fail again.
        self._max_failed_fraction = 1.0 if job.is_retry else job.settings.max_failed_fraction
        self._stop = StopRequest()
        self._rate = Rate()
        self._snapshot: ProgressSnapshot | None = None
        self._checked = 0.0
        self._busy: dict[str, float] = {}
        lease.progress = self._progress

    def run(self) -> None:
        """Caption what is left and commit it, until it is done or stopped.

        Raises:
            Stopped: by a signal, by an error of Ray, or because most rows fail.
            OutputInUse: another driver has taken the lease.
        """
        dataset = receipts_dataset(self._job, self._ledger, self._work, self._coordinator, self._cluster)
        with self._stop.by_signals(), _killed_after(self._coordinator, *self._committers.actors):
            stream = ReceiptStream(dataset)
            try:
                while not stream.ended:
                    self._step(stream)
                    self._stop_if_needed(stream)
                self._commit_rest(self._ledger)
            except ray.exceptions.RayError as error:
                # The first error says more than one that follows from it.
                with contextlib.suppress(ray.exceptions.RayError, OSError):
                    self._commit_rest(self._ledger)
                raise Stopped(
                    f"the job has failed: {_last_line(error)}; finished work is kept; fix the cause and "
                    "run the same command to resume"
                ) from error
        self._console.say(describe_bottleneck(self._busy))

    def _step(self, stream: ReceiptStream) -> None:
        for receipt in stream.take(STEP_S):
            self._tracker.add(receipt)
        now = time.monotonic()
        if now - self._checked >= CHECK_EVERY_S:
            self._checked = now
            self._check()
        self._commit(wait=False)
        self._rate.add(self._tracker.num_rows, now)
        if self._console.wants_progress():
            self._show()

    def _check(self) -> None:
        """Ask the coordinator what unfinished calls have written, and the output which shards were read."""
        receipts, loads = ray.get(self._coordinator.news.remote())
        for receipt in receipts:
            self._tracker.add(receipt)
        self._busy = busy_fractions(loads)
        with contextlib.suppress(OSError):  # A store that fails is asked again in a second.
            self._load_shard_reports(self._job.ledger)

    def _load_shard_reports(self, ledger: Ledger) -> None:
        for shard in ledger.shards_with_a_report():
            if self._tracker.needs_report(shard):
                report = ledger.load_shard_report(shard)
                if report is not None:
                    self._tracker.add_report(report)

    def _commit(self, wait: bool) -> None:
        """Start commits of the shards that are complete now, and collect those that are done."""
        for report in self._tracker.take_complete():
            self._committers.start(report)
        self._committers.collect(wait)

    def _commit_rest(self, ledger: Ledger) -> None:
        """Commit every complete shard. `ledger` decides whether to wait for a store that fails."""
        self._check()
        self._load_shard_reports(ledger)
        self._commit(wait=True)

    def _stop_if_needed(self, stream: ReceiptStream) -> None:
        if self._lease.lost:
            raise OutputInUse(f"another driver has taken the lease of {self._ledger}; this driver stops")
        if self._stop.number is not None:
            self._flush(stream)
            raise StoppedBySignal(self._stop.number)
        if self._tracker.has_too_many_failures(self._max_failed_fraction):
            self._flush(stream)
            seen = ", ".join(f"{n:,} {status}" for status, n in self._tracker.by_status.most_common())
            raise TooManyFailures(
                f"stopped after {self._tracker.num_rows:,} rows ({seen}), because most of them failed; check "
                "the input, or raise --max-failed-fraction, and run the same command to resume"
            )

    def _flush(self, stream: ReceiptStream) -> None:
        """Let running calls write the rows they have finished, and commit what is complete."""
        ray.get(self._coordinator.stop.remote())
        deadline = time.monotonic() + FLUSH_S
        while (
            time.monotonic() < deadline
            and ray.get(self._coordinator.num_running.remote())
            and not stream.ended
        ):
            self._step(stream)
        self._step(stream)
        with contextlib.suppress(OSError):  # The next session reads the reports that are missing now.
            self._commit_rest(self._job.ledger)

    def _progress(self) -> dict[str, Any]:
        """Return the last progress shown, for the heartbeat."""
        return dataclasses.asdict(self._snapshot) if self._snapshot else {}

    def _show(self) -> None:
        rows_left = self._tracker.estimate_rows_left()
        rate = self._rate.mean
        num_shards = len(self._job.run.shards)
        self._snapshot = ProgressSnapshot(
            num_rows=self._tracker.num_rows,
            num_failed=self._tracker.num_failed,
            images_per_s=self._rate.recent,
            shards_done=num_shards - self._tracker.num_open - self._committers.num_under_way,
            num_shards=num_shards,
            left_s=rows_left / rate if rate and rows_left is not None else None,
            busy=self._busy,
        )
        self._console.show(self._snapshot)


@contextmanager
def _killed_after(*actors: Any) -> Iterator[None]:
    """Kill actors at the end of the session, because Ray may live on."""
    try:
        yield
    finally:
        for actor in actors:
            ray.kill(actor)


def _last_line(error: BaseException) -> str:
    """Return what a worker's exception said: the end of the traceback that Ray quotes."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
