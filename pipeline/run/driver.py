"""The driver's loop: take receipts, commit complete shards, show progress, obey signals."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import ray

from pipeline.errors import OutputInUse, Stopped, TooManyFailures
from pipeline.inputs.reader import ShardReport
from pipeline.ledger.commit import Committer
from pipeline.ledger.lease import Lease
from pipeline.ledger.ledger import ShardProgress, load_shard_report, shards_with_a_report
from pipeline.progress import Console, Rate, Snapshot
from pipeline.run.bottleneck import busy_fractions, describe_bottleneck
from pipeline.run.stream import ReceiptStream, receipts_dataset
from pipeline.run.tracker import Tracker
from pipeline.settings.placement import ClusterSize
from pipeline.stages.coordinator import Coordinator
from pipeline.storage.retrying import RETRY_FOR_S, retry_on_oserror

if TYPE_CHECKING:
    from pipeline.run.job import Job

TICK_S = 0.2
LOOK_AROUND_EVERY_S = 1.0
CPUS_PER_COMMITTER = 4
MAX_COMMITTERS = 8
COMMITS_WAITING = 32
"""From so many on the driver waits for one to be done."""
FLUSH_S = 20.0
"""How long calls may take to write what they have after a signal; a preempted machine is given 30 s."""


class Driver:
    """One session of a run, in the main thread."""

    def __init__(self, max_failed_fraction: float, console: Console) -> None:
        self._max_failed_fraction = max_failed_fraction
        self._console = console
        self._stop = threading.Event()
        self._rate = Rate()
        self._snapshot: Snapshot | None = None
        self._looked_around = 0.0
        self._busy: dict[str, float] = {}

    def progress(self) -> dict[str, Any]:
        """For the heartbeat."""
        return dataclasses.asdict(self._snapshot) if self._snapshot else {}

    def run(self, job: Job, left: list[ShardProgress], cluster: ClusterSize, lease: Lease) -> None:
        """Caption what is left and commit it, until it is done or stopped.

        Raises:
            Stopped: by a signal, or because most rows fail.
            OutputInUse: another driver has taken the lease.
        """
        self._job, self._tracker = job, Tracker(left)
        self._coordinator = (
            ray.remote(Coordinator).options(num_cpus=0, max_restarts=-1, max_task_retries=-1).remote()
        )
        committers = _committers(cluster)
        self._committers = itertools.cycle(committers)
        self._commits: dict[Any, ShardReport] = {}
        work = [progress.work for progress in left]
        dataset = receipts_dataset(
            job.settings, job.engine, job.info, work, job.folder, self._coordinator, cluster
        )
        with self._signals(), _ended_after(self._coordinator, *committers):
            stream = ReceiptStream(dataset)
            try:
                while not stream.ended:
                    self._step(stream)
                    self._obey(stream, lease)
                self._commit_rest()
            except ray.exceptions.RayError as error:
                with contextlib.suppress(ray.exceptions.RayError, OSError):  # the first error says more
                    self._commit_rest()
                raise Stopped(
                    f"the job has failed: {_last_line(error)}; what was finished is kept, mend the cause and "
                    "run the same command to go on"
                ) from error
        self._console.say(describe_bottleneck(self._busy))

    def _step(self, stream: ReceiptStream) -> None:
        for receipt in stream.take(TICK_S):
            self._tracker.add(receipt)
        now = time.monotonic()
        if now - self._looked_around >= LOOK_AROUND_EVERY_S:
            self._looked_around = now
            self._look_around()
        self._commit(wait=False)
        self._rate.add(self._tracker.num_rows, now)
        if self._console.wants_progress():
            self._show()

    def _look_around(self) -> None:
        """Learn from the board what calls under way have written, and from files how reading ended."""
        receipts, loads = ray.get(self._coordinator.news.remote())
        for receipt in receipts:
            self._tracker.add(receipt)
        self._busy = busy_fractions(loads)
        with contextlib.suppress(OSError):  # a store that answers badly is asked again in a second
            self._look_for_shard_reports()

    def _look_for_shard_reports(self) -> None:
        for shard in shards_with_a_report(self._job.folder):
            if not self._tracker.knows_end(shard):
                report = load_shard_report(self._job.folder, shard)
                if report is not None:
                    self._tracker.ended(report)

    def _commit(self, wait: bool) -> None:
        """Hand complete shards to be merged and take back what is done."""
        for report in self._tracker.take_complete():
            committer = next(self._committers)
            ref = committer.commit.remote(
                self._job.folder, report, self._job.metadata, self._job.empty_schema
            )
            self._commits[ref] = report
        while self._commits:
            full = wait or len(self._commits) > COMMITS_WAITING
            done, _ = ray.wait(list(self._commits), timeout=None if full else 0)
            if not done:
                return
            for ref in done:
                del self._commits[ref]
                ray.get(ref)

    def _commit_rest(self, retry_for_s: float = RETRY_FOR_S) -> None:
        self._look_around()
        retry_on_oserror(self._look_for_shard_reports, retry_for_s)
        self._commit(wait=True)

    def _obey(self, stream: ReceiptStream, lease: Lease) -> None:
        if lease.lost:
            raise OutputInUse(f"the lease of {self._job.folder} was taken by another driver; this one stops")
        if self._stop.is_set():
            self._flush(stream)
            raise Stopped("stopped by a signal; what was finished is kept, run the same command to go on")
        if self._tracker.has_too_many_failures(self._max_failed_fraction):
            self._flush(stream)
            seen = ", ".join(f"{n:,} {status}" for status, n in self._tracker.by_status.most_common())
            raise TooManyFailures(
                f"stopped after {self._tracker.num_rows:,} rows ({seen}), most of which failed; look at the "
                "input, or raise --max-failed-fraction and run the same command to go on"
            )

    def _flush(self, stream: ReceiptStream) -> None:
        """Let running calls write what they have, and commit what is complete."""
        ray.get(self._coordinator.stop.remote())
        deadline = time.monotonic() + FLUSH_S
        while (
            time.monotonic() < deadline
            and ray.get(self._coordinator.num_running.remote())
            and not stream.ended
        ):
            self._step(stream)
        self._step(stream)
        with contextlib.suppress(OSError):  # then the next session finds out
            self._commit_rest(retry_for_s=0.0)

    def _show(self) -> None:
        left_rows = self._tracker.estimate_rows_left()
        rate = self._rate.mean
        num_shards = len(self._job.run.shards)
        self._snapshot = Snapshot(
            num_rows=self._tracker.num_rows,
            num_failed=self._tracker.num_failed,
            images_per_s=self._rate.recent,
            shards_done=num_shards - self._tracker.num_open - len(self._commits),
            num_shards=num_shards,
            left_s=left_rows / rate if rate and left_rows is not None else None,
            busy=self._busy,
        )
        self._console.show(self._snapshot)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT ask for an orderly stop; a second SIGINT ends at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, _: object) -> None:
            if self._stop.is_set() and number == signal.SIGINT:
                raise KeyboardInterrupt
            self._stop.set()

        before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def _ended_after(*actors: Any) -> Iterator[None]:
    """End actors with the session: Ray itself may live on."""
    try:
        yield
    finally:
        for actor in actors:
            ray.kill(actor)


def _committers(cluster: ClusterSize) -> list[Any]:
    """Actors that merge shards. As tasks, which come in bursts, they would have Ray start a process each."""
    number = max(1, min(MAX_COMMITTERS, int(cluster.num_cpus) // CPUS_PER_COMMITTER))
    kind = ray.remote(Committer).options(
        num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy="SPREAD"
    )
    return [kind.remote() for _ in range(number)]


def _last_line(error: BaseException) -> str:
    """What a worker's exception said: the end of the traceback that Ray quotes."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
