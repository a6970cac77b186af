"""`AttemptRecorder`: writes the record of the attempt under way, a few times a minute and at its end."""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from pipeline.attempts.attempt import MAX_WARNINGS, Attempt, Attempts, Point, WorkerLoad
from pipeline.attempts.environment import command_line, hardware_of, versions
from pipeline.attempts.log import AttemptLog
from pipeline.attempts.store import log_name, make_room, read_attempts, write_attempt
from pipeline.attempts.timeline import Timeline
from pipeline.exit_status import status_of
from pipeline.placement.cluster import Cluster, nodes_alive
from pipeline.storage.folder import Folder
from pipeline.storage.secrets import hide_secrets

WRITE_EVERY_S = 15.0
"""A driver that is killed loses at most this much of its record, and none of its rows. In its first minutes
it writes more often: whenever a tenth of its age has passed."""
MAX_REASON_CHARS = 1_000


class AttemptRecorder:
    """The record of the attempt under way.

    A store that fails does not end the run: the record is written again a little later.
    """

    def __init__(self, folder: Folder, attempt: Attempt, is_begun: bool) -> None:
        """Write the first record, if the run has begun.

        Args:
            folder: the output; its requests are not repeated.
            attempt: the record at the start.
            is_begun: whether the output holds a run. A new run that is refused leaves no record.
        """
        self._folder = folder
        self._is_begun = is_begun
        self.log = AttemptLog(attempt.run_id)
        """What the driver prints; stored now and then, and at the end."""
        self.earlier = Attempts()
        """The attempts of this run before this one."""
        if is_begun:
            with contextlib.suppress(OSError):
                self.earlier = read_attempts(folder)
        self._attempt = attempt
        self._started = self._phase_began = time.monotonic()
        self._phases: dict[str, float] = {}
        self._timeline = Timeline()
        self._before = self._now = Point(0.0, 0)
        self._warnings_before: Counter[str] = Counter()
        self._warnings: Counter[str] = Counter()
        self._quantization: dict[str, int] = {}
        self._workers: dict[str, int] = {}
        self._write()

    def run_has_begun(self, run: str, dtype: str) -> None:
        """Note that the output holds the run, with the digest and dtype that "auto" has become.

        Args:
            run: digest of its fingerprint.
            dtype: of the model.
        """
        self._is_begun = True
        self._attempt = dataclasses.replace(self._attempt, run=run, dtype=dtype)
        with contextlib.suppress(OSError):
            make_room(self._folder)
        self._write()

    def end_phase(self, name: str) -> None:
        """Note that a phase of the start has ended, and the next one begins."""
        now = time.monotonic()
        self._phases[name] = round(now - self._phase_began, 3)
        self._phase_began = now

    def connected(self, cluster: Cluster) -> None:
        """Note that Ray is there, and what its machines are."""
        self.end_phase("start Ray")
        self._note_machines(cluster)

    def look_again(self) -> None:
        """Note what the machines are at the end of the work: nodes may have joined meanwhile."""
        self._note_machines(Cluster(nodes_alive()))

    def _note_machines(self, cluster: Cluster) -> None:
        self._attempt = dataclasses.replace(self._attempt, hardware=hardware_of(cluster))
        self._write()

    def begin_driver(self) -> None:
        """Note that another driver goes on: its workers and its rows count from zero."""
        self._before = self._now
        self._warnings_before = self._warnings

    def note(
        self,
        rows: int,
        loads: Mapping[str, Mapping[str, WorkerLoad]],
        at_work: Collection[str],
        warnings: Mapping[str, int],
        quantization: Mapping[str, int],
        shard_rows: float | None = None,
    ) -> None:
        """Note how far the attempt is.

        Args:
            rows: rows that this driver has counted.
            loads: by stage and worker, including workers that are gone.
            at_work: the workers that are there.
            warnings: of workers, and how often each was given.
            quantization: what workers have quantized, and how many of them.
            shard_rows: mean number of rows of the shards of known length.
        """
        self._quantization |= quantization
        for stage, of in loads.items():
            self._workers[stage] = max(self._workers.get(stage, 0), sum(worker in at_work for worker in of))
        self._attempt = dataclasses.replace(self._attempt, shard_rows=shard_rows)
        self._warnings = self._warnings_before + Counter(warnings)
        seconds = self._seconds
        is_first_row = self._note_start(seconds, rows, loads.get("caption", {}))
        before = self._before
        self._now = Point(
            seconds=round(seconds, 3),
            rows=before.rows + rows,
            busy_s=_added(before.busy_s, {s: [w.busy_s for w in of.values()] for s, of in loads.items()}),
            alive_s=_added(before.alive_s, {s: [w.alive_s for w in of.values()] for s, of in loads.items()}),
        )
        self._timeline.add(self._now)
        if is_first_row or time.monotonic() - self._written >= min(WRITE_EVERY_S, seconds / 10):
            self._write()
            self._write_log()

    def end(self, exit_status: int | None, reason: str) -> None:
        """Write the last record."""
        self._attempt = dataclasses.replace(
            self._attempt,
            ended_s=round(self._seconds, 3),
            exit_status=exit_status,
            reason=hide_secrets(reason)[:MAX_REASON_CHARS],
        )
        self._write()
        self._write_log()

    @property
    def all(self) -> Attempts:
        """All attempts of this run, with this one as it is now."""
        return Attempts((*self.earlier, dataclasses.replace(self._attempt, points=self._timeline.points)))

    @property
    def _seconds(self) -> float:
        return time.monotonic() - self._started

    def _note_start(self, seconds: float, rows: int, captioners: Mapping[str, WorkerLoad]) -> bool:
        """Note when the first captioning worker was ready; return whether the first row is there now."""
        if self._attempt.ready_s is None and captioners:
            ready_s = max(0.0, seconds - max(load.alive_s for load in captioners.values()))
            self._attempt = dataclasses.replace(self._attempt, ready_s=round(ready_s, 3))
            since = self._phase_began - self._started
            self._phases["load the model"] = round(max(0.0, ready_s - since), 3)
            self._phase_began = max(self._phase_began, self._started + ready_s)
        if not rows or "first row" in self._phases or self._attempt.ready_s is None:
            return False
        self.end_phase("first row")
        return True

    def _write(self) -> None:
        self._written = time.monotonic()
        self._attempt = dataclasses.replace(
            self._attempt,
            phases=dict(self._phases),
            points=self._timeline.points,
            workers=dict(self._workers),
            warnings=dict(self._warnings.most_common(MAX_WARNINGS)),
            quantization=dict(self._quantization),
        )
        if not self._is_begun:
            return
        with contextlib.suppress(OSError):
            write_attempt(self._folder, self._attempt)

    def _write_log(self) -> None:
        if self._is_begun:
            with contextlib.suppress(OSError):
                self._folder.put(log_name(self._attempt), self.log.content())


def _added(before: Mapping[str, float], workers: Mapping[str, list[float]]) -> dict[str, float]:
    stages = dict.fromkeys([*before, *workers])
    return {stage: round(before.get(stage, 0.0) + sum(workers.get(stage, ())), 3) for stage in stages}


@contextmanager
def recorded(folder: Folder, *, is_begun: bool, **known: Any) -> Iterator[AttemptRecorder]:
    """Record the attempt that the block makes; an exception says how it ended.

    Args:
        folder: the output; its requests are not repeated.
        is_begun: whether the output holds a run already.
        known: fields of `Attempt` that are known at the start.
    """
    begun = datetime.now(UTC).isoformat(timespec="microseconds")
    attempt = Attempt(
        id=secrets.token_hex(4), begun=begun, command=command_line(), versions=versions(), **known
    )
    recorder = AttemptRecorder(folder, attempt, is_begun)
    try:
        yield recorder
    except BaseException as error:
        reason = str(error) or type(error).__name__
        recorder.log.add("error", reason)
        recorder.end(status_of(error), reason)
        raise
