"""`Driver`: the loop that takes receipts, commits complete shards, shows progress and reacts to signals."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray

from pipeline.attempts.attempt import WorkerLoad
from pipeline.attempts.recorder import AttemptRecorder
from pipeline.errors import Stopped, StoppedBySignal, TooManyFailures, name_of
from pipeline.ledger.lease import Lease
from pipeline.ledger.scan import ShardProgress
from pipeline.metrics import SHARDS, label_with_run
from pipeline.placement.reservations import Reservations
from pipeline.progress import Console, ProgressSnapshot, Rate
from pipeline.report.pace import verdict
from pipeline.run.bottleneck import WorkerLoads, busy_fractions
from pipeline.run.cluster import log_folder
from pipeline.run.committers import Committers
from pipeline.run.failure import describe_failure, end_named_by
from pipeline.run.job import Job
from pipeline.run.signals import StopRequest
from pipeline.run.stream import ReceiptStream, receipts_dataset
from pipeline.run.tracker import Tracker
from pipeline.stages.coordinator import Coordinator, News
from pipeline.stages.storage_trouble import describe
from pipeline.watch.members import Members

STEP_S = 0.2
"""How long one step waits for receipts."""
CHECK_EVERY_S = 1.0
"""Seconds between two questions to the coordinator."""
FLUSH_S = 5.0
"""How long running calls may write finished rows after a signal, which they notice within about 2 s."""
COMMIT_S = 2.0
"""How long commits may take after that; the next start commits the others."""


class Driver:
    """The main loop of a run: it drives what is left of a job, in the main thread, on a connected Ray.

    The run ends early in one of six ways:

    - A signal: running calls write the rows they have finished (for at most `FLUSH_S`), complete shards are
      committed (for at most `COMMIT_S`), and `StoppedBySignal` is raised. A second SIGINT (Ctrl-C) ends the
      process at once.
    - Most rows fail: the same, with `TooManyFailures`.
    - Ray gives up on a stage or a commit: complete shards are committed, and `Stopped` names the cause.
    - A device has failed several times: the same as with a signal, with `DeviceLeftOut`.
    - An endpoint keeps refusing the key: the same, with `Stopped`.
    - Another driver has taken the lease: `OutputInUse` is raised at once.

    In each case finished work stays in the output, and the same command resumes it.
    """

    def __init__(
        self,
        job: Job,
        left: Sequence[ShardProgress],
        reservations: Reservations,
        lease: Lease,
        stop: StopRequest,
        console: Console,
        attempt: AttemptRecorder,
        members: Members,
    ) -> None:
        """Start the actors that are not stages.

        Args:
            job: requests to its output are retried, because its work must not be lost.
            left: the shards with rows to do.
            reservations: what each stage reserves.
            lease: its heartbeats carry the progress from now on.
            stop: notes the signals.
            attempt: its record gets the progress too.
            members: says which nodes and workers come and go, and which are awaited.
        """
        self._job = job
        self._lease = lease
        self._stop = stop
        self._console = console
        self._attempt = attempt
        self._members = members
        self._work = [progress.work for progress in left]
        self._tracker = Tracker(left, attempt.earlier.shard_rows)
        self._reservations = reservations
        self._coordinator: Any = (
            ray.remote(Coordinator).options(num_cpus=0, max_restarts=-1, max_task_retries=-1).remote()
        )
        self._committers = Committers(job, self._coordinator)
        # A retry runs rows that failed before; most of them may fail again.
        self._max_failed_fraction = 1.0 if job.is_retry else job.settings.max_failed_fraction
        self._rate = Rate()
        self._snapshot: ProgressSnapshot | None = None
        self._checked = 0.0
        self._worker_loads = WorkerLoads()
        self._loads: dict[str, dict[str, WorkerLoad]] = {}
        self._trouble: str | None = None
        self._end: Stopped | None = None
        label_with_run()
        lease.progress = self._progress
        console.phase("starting the workers")

    def run(self) -> None:
        """Caption what is left and commit it, until it is done or stopped.

        Raises:
            DeviceLeftOut: a device has failed several times.
            Stopped: by a signal, by an error of Ray, or because most rows fail.
            OutputInUse: another driver has taken the lease.
        """
        dataset = receipts_dataset(self._job, self._work, self._coordinator, self._reservations)
        with (
            self._stop.deferred(),
            _killed_after(self._coordinator),
            contextlib.closing(self._committers),
            contextlib.closing(ReceiptStream(dataset)) as stream,
        ):
            try:
                while not stream.ended:
                    self._step(stream)
                    self._stop_if_needed(stream)
                self._commit_rest(stream)
            except ray.exceptions.RayError as error:
                # An error here would only follow from the first one, which says more.
                with contextlib.suppress(ray.exceptions.RayError, OSError):
                    self._flush(stream)
                self._console.fail(f"logs of this machine's workers: {log_folder()}")
                raise Stopped(
                    f"the job has failed: {describe_failure(error)}; finished work is kept; fix the cause "
                    "and run the same command to resume"
                ) from error
        self._attempt.look_again()
        self._console.say(verdict(self._attempt.all))
        self._console.say_repeated()

    def _step(self, stream: ReceiptStream) -> None:
        for receipt in stream.take(STEP_S):
            self._tracker.add(receipt)
        now = time.monotonic()
        if now - self._checked >= CHECK_EVERY_S:
            self._checked = now
            self._check()
        self._commit()
        self._rate.add(self._tracker.num_rows, now)
        self._show(stream)

    def _check(self) -> None:
        """Ask the coordinator what unfinished calls have written, and which shards were read to their end."""
        news = ray.get(self._coordinator.news.remote())
        for receipt in news.receipts:
            self._tracker.add(receipt)
        for report in news.shard_reports:
            self._tracker.add_report(report)
        self._members.look()
        at_work, tracker = self._members.at_work, self._tracker
        self._loads = self._worker_loads.stop_gone(news.loads, at_work)
        self._export()
        self._attempt.note(
            tracker.num_rows, self._loads, at_work, news.warnings, news.quantization, tracker.mean_rows
        )
        self._say_start(news)
        self._console.count_warnings(news.warnings)
        self._stop.store_fails = bool(news.troubles)
        self._say_trouble(describe(news.troubles))
        for failure in news.failures:
            self._console.fail(f"{failure.device} has failed: {failure.reason}; its images go again")
        self._end = self._end or end_named_by(news)
        self._committers.resize()

    def _export(self) -> None:
        """Set the metrics that only the driver knows."""
        num_open, num_committing = self._tracker.num_open, self._committers.num_under_way
        SHARDS.set(num_open, {"state": "open"})
        SHARDS.set(num_committing, {"state": "committing"})
        SHARDS.set(len(self._job.part.shards) - num_open - num_committing, {"state": "done"})

    def _say_start(self, news: News) -> None:
        """Say what the workers do until the first row is there: the phase that was begun last."""
        if self._tracker.num_rows:
            return
        if news.loads.get("caption"):
            self._console.phase("captioning the first images")
        elif news.starting:
            self._console.phase(news.starting[-1])

    def _say_trouble(self, trouble: str | None) -> None:
        """Say once that a store fails, and once that it works again; the progress shows it in between."""
        if trouble and not self._trouble:
            self._console.warn(f"{trouble}; the job goes on when it works again")
        if self._trouble and not trouble:
            self._console.say(f"{self._trouble.split(';')[0]}, and works again")
        self._trouble = trouble

    def _commit(self) -> None:
        """Start commits of the shards that are complete now, and collect those that are done."""
        if self._lease.is_certain:  # Otherwise another driver may have begun these shards again.
            for report in self._tracker.take_complete():
                self._committers.start(report)
        self._committers.collect(STEP_S if self._committers.are_behind else 0.0)

    def _commit_rest(self, stream: ReceiptStream) -> None:
        """Commit every complete shard, however long the output fails; only a signal ends the wait.

        No commit begins while the lease is not certain; the final sweep makes up for those.
        """
        self._check()
        unread = self._tracker.without_report()
        if unread:  # The coordinator has died and forgotten them.
            for report in self._job.ledger.load_shard_reports(unread):
                self._tracker.add_report(report)
        self._commit()
        while self._committers.num_under_way:
            self._step(stream)
            self._committers.collect(STEP_S)
            self._stop_if_needed(stream)
        self._committers.keep_summaries()

    def _stop_if_needed(self, stream: ReceiptStream) -> None:
        if self._lease.lost:
            raise self._lease.taken()
        if self._stop.number is not None:
            limit_s = FLUSH_S + COMMIT_S
            self._console.say(
                f"{name_of(self._stop.number)}: writing what is finished, for at most {limit_s:.0f} s; "
                "Ctrl-C ends it at once"
            )
            self._flush(stream)
            raise StoppedBySignal(self._stop.number)
        if self._end is not None:
            self._flush(stream)
            raise self._end
        if self._tracker.has_too_many_failures(self._max_failed_fraction):
            self._flush(stream)
            seen = ", ".join(f"{n:,} {status}" for status, n in self._tracker.by_status.most_common())
            raise TooManyFailures(
                f"stopped after {self._tracker.num_rows:,} rows ({seen}), because most of them failed; check "
                "the input, or raise --max-failed-fraction, and run the same command to resume"
            )

    def _flush(self, stream: ReceiptStream) -> None:
        """Let running calls write the rows they have finished, and commit what is complete.

        Workers give up on a store that fails. The next start makes again what was not written, reads the
        reports, and commits the shards that are missing now.
        """
        ray.get(self._coordinator.stop.remote())
        deadline = time.monotonic() + FLUSH_S
        with contextlib.suppress(ray.exceptions.RayError, OSError):
            while (
                time.monotonic() < deadline
                and ray.get(self._coordinator.num_running.remote())
                and not stream.ended
            ):
                self._step(stream)
            self._step(stream)
            self._check()
        deadline = time.monotonic() + COMMIT_S
        with contextlib.suppress(ray.exceptions.RayError, OSError):
            self._commit()
            while self._committers.num_under_way and time.monotonic() < deadline:
                self._committers.collect(STEP_S)
            self._committers.keep_summaries()

    def _progress(self) -> dict[str, Any]:
        """Return the last progress shown, for the heartbeat."""
        return dataclasses.asdict(self._snapshot) if self._snapshot else {}

    def _show(self, stream: ReceiptStream) -> None:
        rows_left = self._tracker.estimate_rows_left()
        rate = self._rate.mean or self._attempt.earlier.rows_per_s
        num_shards = len(self._job.part.shards)
        self._snapshot = ProgressSnapshot(
            num_rows=self._tracker.num_rows,
            num_failed=self._tracker.num_failed,
            images_per_s=self._rate.recent,
            shards_done=num_shards - self._tracker.num_open - self._committers.num_under_way,
            num_shards=num_shards,
            left_s=rows_left / rate if rate and rows_left is not None else None,
            busy=busy_fractions(self._loads),
            trouble=self._trouble or self._members.stalled,
            total_rows=None if rows_left is None else self._tracker.num_rows + rows_left,
            rows_by_stage=stream.rows_by_stage(),
        )
        self._console.show(self._snapshot)


@contextmanager
def _killed_after(actor: Any) -> Iterator[None]:
    """Kill an actor at the end of the block, because Ray may outlive the attempt."""
    try:
        yield
    finally:
        ray.kill(actor)
