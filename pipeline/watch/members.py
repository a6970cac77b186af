"""`Members`: sentences about nodes and workers that come and go, and about those that a job waits for."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

import ray

from pipeline.progress import LINE_EVERY_S, LOG_EVERY_S, count
from pipeline.watch.autoscaler import autoscaler_says
from pipeline.watch.view import CAPTIONING, DECODING, LOADS, RUNS, WAITS, View, WorkerSeen, look_at_members
from pipeline.watch.waiting import Reminder, Say, at

MAX_NAMED = 3


def node_changes(before: View, now: View) -> list[str]:
    """Return which nodes are gone and which have joined between two views, as sentences."""
    said = []
    for key, node in now.nodes.items():
        if key in before.nodes and before.nodes[key].is_alive and not node.is_alive:
            gone = "was lost" if node.is_missed else "was stopped"
            reason = f": {node.reason}" if node.reason else ""
            # Ray forgets what a node had when it is gone.
            left = f"the cluster has {count(now.num_nodes, 'node')} left"
            said.append(f"node {before.nodes[key]} {gone}{reason}; {left}")
    joined = [node for key, node in now.nodes.items() if node.is_alive and key not in before.nodes]
    if joined and before.nodes:
        more = f" and {len(joined) - MAX_NAMED} more" if len(joined) > MAX_NAMED else ""
        names = f"{', '.join(map(str, joined[:MAX_NAMED]))}{more}"
        nodes = "node" if len(joined) == 1 else "nodes"
        said.append(f"{nodes} {names} joined; the cluster has {count(now.num_nodes, 'node')}")
    return said


class Members:
    """Says what changes in a cluster while a job runs, and what the job waits for."""

    def __init__(self, say: Say, needs: Mapping[str, object], is_local: bool) -> None:
        """Begin with an empty view.

        Args:
            say: prints a line.
            needs: what a worker of each stage reserves, in words.
            is_local: whether Ray runs on this machine alone. Then only losses, replacements and long waits
                are news; the phases of the start cover the rest.
        """
        self._say, self._needs, self._is_local = say, needs, is_local
        self._view = View()
        self._num_lost: Counter[str] = Counter()
        """Workers of each stage that were lost and have not been replaced."""
        self._since: dict[tuple[str, str], datetime] = {}
        """When each actor entered its state."""
        self._reminder = Reminder(say, LINE_EVERY_S if is_local else LOG_EVERY_S)
        self.awaited: str | None = None
        """The missing workers, since when and why, and what the autoscaler does; None if all are at work."""

    @property
    def stalled(self) -> str | None:
        """What the job waits for while no image can be captioned, for the line of progress."""
        is_stalled = self.awaited is not None and not self._view.of(CAPTIONING)
        return f"waiting for {self.awaited}" if is_stalled else None

    @property
    def at_work(self) -> set[str]:
        """The workers that are at work, by the names that they give themselves (`worker_name`)."""
        workers = self._view.workers.values()
        return {f"{self._view.host(each)}-{each.pid}" for each in workers if each.state == RUNS}

    def look(self) -> None:
        """Look at the cluster, and say what is new."""
        with contextlib.suppress(ray.exceptions.RayError, ConnectionError, RuntimeError):
            self.take(look_at_members())

    def take(self, view: View) -> None:
        """Say what is new in a view."""
        before, self._view = self._view, view
        if not self._is_local:
            for sentence in node_changes(before, view):
                self._say(sentence)
        for stage in (CAPTIONING, DECODING):
            self._say_changes(before, stage)
        now = datetime.now(UTC)
        states = [(key, worker.state) for key, worker in view.workers.items()]
        self._since = {each: self._since.get(each, now) for each in states}
        self.awaited = self._describe_awaited()
        self._reminder.remind(self.awaited)

    def _say_changes(self, before: View, stage: str) -> None:
        """Say which workers of a stage were lost, and which have come to work or come back."""
        view, then, now = self._view, before.of(stage), self._view.of(stage)
        for process, worker in then.items():
            if process in now or process[0] not in view.workers:  # at work, or let go
                continue
            node = view.nodes.get(worker.node)
            why = "its process has died" if node is None or node.is_alive else "its node is gone"
            left = count(len(now), f"{stage} worker")
            self._say(f"{before.name(worker)} was lost: {why}; {left} left, and its images go again")
            self._num_lost[stage] += 1
        ready = [worker for process, worker in now.items() if process not in then]
        num_again = min(len(ready), self._num_lost[stage])
        self._num_lost[stage] -= num_again
        if num_again or (ready and stage == CAPTIONING and not self._is_local):
            who = f"{view.name(ready[0])} is" if len(ready) == 1 else f"{len(ready)} {stage} workers are"
            self._say(f"{who} ready; {len(now)} at work")

    def _describe_awaited(self) -> str | None:
        view, phrases = self._view, []
        for stage in (CAPTIONING, DECODING):
            if stage == DECODING and view.of(DECODING):
                continue  # Some decode, so rows move.
            for state in (LOADS, WAITS):
                workers = view.of(stage, state)
                if workers:
                    since = at(min(self._since[key, state] for key, _ in workers))
                    why = self._why(list(workers.values()))
                    phrases.append(f"{count(len(workers), f'{stage} worker')} {why} since {since}")
        if not phrases:
            return None
        at_work = len(view.of(CAPTIONING))
        waits = view.of(CAPTIONING, WAITS) or view.of(DECODING, WAITS)
        tail = autoscaler_says() if waits and not self._is_local else ""
        return f"{' and '.join(phrases)}{f'; {at_work} at work' if at_work else ''}{tail}"

    def _why(self, workers: Sequence[WorkerSeen]) -> str:
        """Return what workers of one stage and state are doing, as the end of a phrase."""
        first = workers[0]
        if first.state == WAITS:
            return f"({self._needs[first.stage]}), for which no node has room,"
        hosts = sorted({self._view.host(worker) for worker in workers})
        more = f" and {len(hosts) - MAX_NAMED} more nodes" if len(hosts) > MAX_NAMED else ""
        does = "loading the model" if first.stage == CAPTIONING else "starting"
        return f"{does} on {', '.join(hosts[:MAX_NAMED])}{more}"
