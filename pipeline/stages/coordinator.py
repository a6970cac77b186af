"""The coordinator: a small actor next to the stages that remembers what a dying process cannot.

The rule of blame: when a process dies, Ray starts a new one and runs its captioning calls again. Such a call
runs alone in its process and in small steps, and says here which step begins. If the process dies again, one
row of that step is to blame, so each of them then runs alone. A row on which the process has died
`MAX_DEATHS_ALONE` times while it ran alone gets the status `failed`; otherwise it would kill forever.

The coordinator also keeps the receipts of fragments that such a call has written, and passes on the request
to stop. It collects which shards were read to their end, how busy the stages are, and which workers have
trouble with a store.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ray

from blip2_actor import Status
from pipeline.attempts.attempt import WorkerLoad
from pipeline.inputs.reader import ShardReport
from pipeline.ledger.fragments import store_shard_report
from pipeline.metrics import DEVICE_FAILURES, REPLAYED_CALLS, STAGE_BUSY_S, STAGE_WORKERS, label_with_run
from pipeline.rowset import Range, RowSet
from pipeline.stages.device_health import Device, DeviceFailure, DeviceFailures
from pipeline.stages.receipts import Receipt
from pipeline.stages.worker_log import tell_origins
from pipeline.storage.folder import Folder
from pipeline.storage.retrying import Trouble

MAX_DEATHS_ALONE = 2
"""Deaths of the process while a row runs alone, after which the row fails. One death may be chance, such as
the loss of a node."""
MAX_WARNINGS = 1_000
"""Different warnings of different workers that are counted."""
TROUBLE_LASTS_S = 60.0
"""A worker that reports trouble and then nothing for this long has died; one request may take as long."""


@dataclass
class CallHistory:
    """A captioning call that has started and not ended; positions are those in its table."""

    num_starts: int = 0
    """1 for a call that has never died."""
    step: Sequence[int] = ()
    """Positions that run now with nothing else in their process."""
    finished: RowSet = field(default_factory=RowSet)
    """Positions that have reached a fragment."""
    deaths_alone: dict[int, int] = field(default_factory=dict)
    """Positions that may have killed the process, each with the number of times it did so alone."""
    receipts: list[Receipt] = field(default_factory=list)
    """The receipts of the finished positions."""

    def start(self) -> None:
        """Note a start. A step that began but was not written has died."""
        self.num_starts += 1
        died_alone = 1 if len(self.step) == 1 else 0
        for position in self.step:
            self.deaths_alone[position] = self.deaths_alone.get(position, 0) + died_alone
        self.step = ()


@dataclass(frozen=True)
class News:
    """What the driver asks for about once a second."""

    receipts: list[Receipt]
    """Receipts since the last news; they are here long before the captioning calls that wrote them end."""
    shard_reports: list[ShardReport]
    """How reading some shards ended since the last news."""
    loads: dict[str, dict[str, WorkerLoad]]
    """How busy each worker was, by stage and worker."""
    troubles: list[Trouble]
    """Troubles of the workers whose requests fail now."""
    failures: list[DeviceFailure]
    """Failures of devices since the last news."""
    warnings: dict[str, int] = field(default_factory=dict)
    """Warnings of workers, and how often each was given since the start."""
    quantization: dict[str, int] = field(default_factory=dict)
    """What workers have quantized, and how many of them since the start."""
    starting: tuple[str, ...] = ()
    """What the captioning workers that are not ready do, the latest news last."""


class Coordinator:
    """A plain class; the job makes an actor of it that reserves no CPU."""

    def __init__(self) -> None:
        label_with_run()
        tell_origins()
        self._calls: dict[str, CallHistory] = {}
        self._commits: Counter[str] = Counter()
        self._loads: dict[str, dict[str, tuple[float, float]]] = {}
        self._new_receipts: list[Receipt] = []
        self._new_reports: list[ShardReport] = []
        self._troubles: dict[str, tuple[float, Trouble]] = {}
        """The trouble of each worker, and when it was reported."""
        self._failures = DeviceFailures()
        self._warnings: dict[tuple[str, str], int] = {}
        self._quantization: dict[str, str] = {}
        self._starting: dict[str, str] = {}
        self._stopping = False

    def begin_call(self, call: str) -> CallHistory:
        """Note that a call starts. If it has started before and not ended, its process has died."""
        history = self._calls.setdefault(call, CallHistory())
        history.start()
        if history.num_starts > 1:
            REPLAYED_CALLS.inc()
        return history

    def begin_step(self, call: str, positions: Sequence[int]) -> None:
        """Note that these positions now run with nothing else in their process."""
        if call in self._calls:
            self._calls[call].step = positions

    def wrote(
        self, call: str, positions: Sequence[Range], receipts: Sequence[Receipt], device: Device
    ) -> None:
        """Note that these positions have reached fragments, and on which device they were made."""
        self._new_receipts.extend(receipts)
        if any(status == Status.OK for receipt in receipts for status, _ in receipt.by_status):
            self._failures.has_worked(device)
        if call in self._calls:
            state = self._calls[call]
            state.step = ()
            state.finished.update(positions)
            state.receipts.extend(receipts)

    def was_read(self, report: ShardReport) -> None:
        """Note how reading a shard ended."""
        self._new_reports.append(report)

    def device_failed(self, device: Device, reason: str, calls: Sequence[str]) -> None:
        """Note that the engine of a process has failed while it ran these calls."""
        DEVICE_FAILURES.inc()
        alone = None
        for call in calls:
            step = self._calls[call].step if call in self._calls else ()
            if len(step) > 1:
                return
            if step:
                alone = (call, step[0])
        self._failures.add(device, reason, alone)

    def end_call(self, call: str) -> None:
        """Forget a call that has returned."""
        self._calls.pop(call, None)

    def begin_commit(self, shard: str) -> int:
        """Note that the commit of a shard starts; return how often it has: each death starts it again."""
        self._commits[shard] += 1
        return self._commits[shard]

    def end_commit(self, shard: str) -> None:
        """Forget the commit of a shard that has ended."""
        del self._commits[shard]

    def stop(self) -> None:
        """Ask all calls to write the rows that are finished and return."""
        self._stopping = True

    def is_stopping(self) -> bool:
        """Return whether calls should return."""
        return self._stopping

    def num_running(self) -> int:
        """Return the number of calls that have started and not ended."""
        return len(self._calls)

    def report(self, stage: str, worker: str, busy_s: float, alive_s: float) -> None:
        """Note how busy a worker was; it counts as alive while it reports nothing new."""
        workers = self._loads.setdefault(stage, {})
        before_s, _ = workers.get(worker, (0.0, 0.0))
        workers[worker] = (busy_s, time.monotonic() - alive_s)
        if busy_s > before_s:
            STAGE_BUSY_S.inc(busy_s - before_s, {"stage": stage})

    def starts(self, worker: str, text: str | None) -> None:
        """Note what a captioning worker does before it is ready; None when it is."""
        self._starting.pop(worker, None)
        if text is not None:
            self._starting[worker] = text

    def warned(self, worker: str, text: str, number: int) -> None:
        """Note that a worker has given a warning `number` times; only the first `MAX_WARNINGS` are kept."""
        if (worker, text) in self._warnings or len(self._warnings) < MAX_WARNINGS:
            self._warnings[worker, text] = number

    def quantized(self, worker: str, summary: str) -> None:
        """Note what a worker has quantized."""
        self._quantization[worker] = summary

    def report_trouble(self, worker: str, trouble: Trouble | None) -> bool:
        """Note that a worker's requests fail, or work again; return whether it should go on trying."""
        told, before = self._troubles.pop(worker, (0.0, None))
        if trouble is not None:
            now = time.monotonic()
            if before is not None:  # Several requests of a worker may fail at the same time.
                trouble = replace(trouble, seconds=max(trouble.seconds, before.seconds + now - told))
            self._troubles[worker] = now, trouble
        return not self._stopping

    def news(self) -> News:
        """Return what is new since the last call of this method."""
        receipts, self._new_receipts = self._new_receipts, []
        reports, self._new_reports = self._new_reports, []
        now = time.monotonic()
        for stage, workers in self._loads.items():  # always: Ray drops a gauge that is not set for 20 s
            STAGE_WORKERS.set(len(workers), {"stage": stage})
        loads = {
            stage: {worker: WorkerLoad(busy_s, now - born_s) for worker, (busy_s, born_s) in workers.items()}
            for stage, workers in self._loads.items()
        }
        troubles = [
            replace(trouble, seconds=trouble.seconds + now - told)
            for told, trouble in self._troubles.values()
            if now - told < TROUBLE_LASTS_S
        ]
        warnings: Counter[str] = Counter()
        for (_, text), number in self._warnings.items():
            warnings[text] += number
        return News(
            receipts,
            reports,
            loads,
            troubles,
            self._failures.take(),
            dict(warnings),
            dict(Counter(self._quantization.values())),
            tuple(self._starting.values()),
        )


def report_shard(coordinator: Any, output: Folder, report: ShardReport) -> None:
    """Store how reading a shard ended, and tell the coordinator.

    The driver learns it from the coordinator. The stored report is for the next driver.

    Args:
        output: its requests are retried. Each read task has a copy of it.
    """
    store_shard_report(output, report)
    ray.get(coordinator.was_read.remote(report))
