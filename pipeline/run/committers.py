"""`Committers`: actors that merge complete shards into their files, next to the stages.

They are actors and not tasks: commits come in bursts, and Ray would start a process for each task of a burst.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import ray

from pipeline.errors import noted
from pipeline.inputs.reader import ShardReport
from pipeline.ledger.commit import Summary
from pipeline.ledger.ledger import Ledger
from pipeline.ledger.summaries import SUMMARIES_PER_FILE
from pipeline.metrics import COMMIT_S, timed
from pipeline.run.job import Job
from pipeline.stages.storage_trouble import tell_coordinator

CPUS_PER_COMMITTER = 4
MAX_COMMITTERS = 8
MAX_STARTS = 10
"""Starts of one commit; if its process died each time, it would also kill the next one, without end."""
MAX_WAITING = 32
"""With more commits under way, the driver waits for some of them."""


class Committer:
    """A plain class; the job makes actors of it that reserve no CPU."""

    def __init__(
        self, coordinator: Any, ledger: Ledger, metadata: Mapping[bytes, bytes], empty_schema: pa.Schema
    ) -> None:
        """Take the output once, and not with each commit: it opens its store, and may name many shards."""
        tell_coordinator(coordinator)
        self._coordinator = coordinator
        self._ledger, self._metadata, self._empty_schema = ledger, metadata, empty_schema

    def commit(self, report: ShardReport) -> Summary | None:
        with timed(COMMIT_S), noted(f"committing {report.shard}", report.shard):
            number = ray.get(self._coordinator.begin_commit.remote(report.shard))
            if number > MAX_STARTS:
                raise RuntimeError(f"its process has died {number - 1} times, perhaps for lack of memory")
            summary = self._ledger.commit(report, self._metadata, self._empty_schema)
            self._coordinator.end_commit.remote(report.shard)
            return summary


class Committers:
    """Commits under way, spread over the actors in turn."""

    def __init__(self, job: Job, coordinator: Any) -> None:
        """Start no actor yet: when a job starts, the processes of its stages come first.

        Args:
            coordinator: handle of the job's `Coordinator` actor, which hears when the output fails.
        """
        self._arguments = (coordinator, job.ledger, job.metadata, job.empty_schema)
        self._ledger = job.ledger
        self._class = ray.remote(Committer).options(
            num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy="SPREAD"
        )
        self._actors: deque[Any] = deque()
        """The committing actors, in the order in which they get the next commits."""
        self._under_way: list[Any] = []
        self._summaries: list[Summary] = []
        self._keep_at = SUMMARIES_PER_FILE

    def resize(self) -> None:
        """Start or release actors, so that their number fits the CPUs of the nodes that are alive.

        An actor without a handle ends after its commits.
        """
        num_cpus = int(ray.cluster_resources().get("CPU", 0.0))
        wanted = max(1, min(MAX_COMMITTERS, num_cpus // CPUS_PER_COMMITTER))
        while len(self._actors) < wanted:
            self._actors.append(self._class.remote(*self._arguments))
        while len(self._actors) > wanted:
            self._actors.popleft()

    def close(self) -> None:
        """End the actors, because Ray may outlive the job."""
        for actor in self._actors:
            ray.kill(actor)

    @property
    def num_under_way(self) -> int:
        return len(self._under_way)

    @property
    def are_behind(self) -> bool:
        """Whether so many commits are under way that the driver should wait for some of them."""
        return len(self._under_way) > MAX_WAITING

    def start(self, report: ShardReport) -> None:
        """Begin to commit a shard whose rows are all in fragments."""
        if not self._actors:
            self.resize()
        actor = self._actors[0]
        self._actors.rotate(-1)
        self._under_way.append(actor.commit.remote(report))

    def collect(self, wait_s: float = 0.0) -> None:
        """Take back the commits that are done; wait at most `wait_s` seconds for one.

        Raises:
            ray.exceptions.RayError: a commit has failed.
        """
        if self._under_way:
            number = len(self._under_way)
            done, _ = ray.wait(self._under_way, num_returns=1, timeout=wait_s)
            if done and number > 1:  # also take the others that are done
                done, _ = ray.wait(self._under_way, num_returns=number, timeout=0)
            self._under_way = [commit for commit in self._under_way if commit not in set(done)]
            self._summaries += filter(None, ray.get(done))
        if len(self._summaries) >= self._keep_at:
            self.keep_summaries()

    def keep_summaries(self) -> None:
        """Store the summaries of the shards that were committed since the last call.

        A store that fails does not hold the driver up: the footers have the same summaries.
        """
        try:
            self._ledger.with_retries(0.0).keep_summaries(self._summaries)
            self._summaries, self._keep_at = [], SUMMARIES_PER_FILE
        except OSError:
            self._keep_at = len(self._summaries) + SUMMARIES_PER_FILE
