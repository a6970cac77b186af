"""The write stage: the job's last stage captions images and writes the rows as fragments.

The call that has made rows also writes them, so that rows never cross Ray's object store; the stage returns
small receipts. Finished rows are written every few seconds, together with those of other calls, so that a
death costs little work. A call whose process has died before goes through the careful replay instead.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.compute as pc
import ray

from blip2_actor import Status
from pipeline.errors import noted
from pipeline.ledger.ledger import Ledger
from pipeline.metrics import MODEL_LOAD_S, ROWS, timed
from pipeline.placement.own_accelerator import use_own_accelerator
from pipeline.rowset import ranges_of
from pipeline.settings.caption_spec import CaptionSpec
from pipeline.stages.caption import CaptionStage, FinishedRows
from pipeline.stages.careful_replay import replay
from pipeline.stages.coordinator import CallHistory
from pipeline.stages.device_health import Device, Watchdog
from pipeline.stages.engine_fault import EngineFault
from pipeline.stages.fragment_writer import FragmentWriter, split_by_shard
from pipeline.stages.model_check import Models, require_same_models
from pipeline.stages.output_rows import output_rows
from pipeline.stages.pools import BLOCK_ROWS
from pipeline.stages.receipts import Receipt, receipts_to_table
from pipeline.stages.shared_exclusive_lock import SharedExclusiveLock
from pipeline.stages.storage_trouble import ANSWER_S, tell_coordinator
from pipeline.stages.worker_log import worker_name
from pipeline.stages.worker_messages import tell_warnings, telling_start

PIECE_S = 1.0
"""A call writes its finished rows after this many seconds, and waits up to `HOLD_S` for other calls: a death
costs at most the work of both times."""

logger = logging.getLogger(__name__)


class WriteStage:
    """Captions the tables of the decode stage and writes the rows as fragments; returns receipts.

    An actor of a Ray Data pool holds it and runs several calls at the same time.
    """

    def __init__(
        self,
        spec: CaptionSpec,
        models: Models,
        kept: Sequence[str],
        ledger: Ledger,
        coordinator: Any,
        step_timeout_s: float,
        accelerators: Mapping[str, float],
    ) -> None:
        """Start an engine.

        Args:
            spec: what is made of each image.
            models: the models that the driver found; they are part of the run's fingerprint.
            kept: columns of the input that go into the output.
            ledger: the output; its requests are retried.
            coordinator: handle of the job's `Coordinator` actor.
            step_timeout_s: seconds without progress of the engine after which this process ends.
            accelerators: what this worker has reserved, by names in Ray; empty on CPUs.

        Raises:
            ValueError: this machine finds other models, or torch cannot use the accelerator.
        """
        self._worker = worker_name()
        use_own_accelerator(spec.engine, accelerators)
        with telling_start(coordinator, self._worker):
            require_same_models(models, Models.of(spec, spec.engine.info()))
            with timed(MODEL_LOAD_S):
                self._stage = CaptionStage(spec)
        self._kept = list(kept)
        self._writer = FragmentWriter(ledger)
        self._coordinator = coordinator
        self._lock = SharedExclusiveLock()
        tell_coordinator(coordinator, lambda: self._writer.num_held)
        self._device = Device.of_this_worker()
        self._calls: set[str] = set()
        self._giving_up = threading.Lock()
        self._started = time.monotonic()
        tell_warnings(coordinator, self._worker)
        record = getattr(self._stage.actor.engine, "quantization", None)
        if record is not None:
            coordinator.quantized.remote(self._worker, record.summary())
        self._report()  # The driver sees that this worker is ready.
        Watchdog(self._stage.stats, step_timeout_s, self._give_up).start()

    def __call__(self, table: pa.Table) -> pa.Table:
        """Caption and write a table; return the receipts of its rows as a table."""
        call = _name_of(table)
        self._calls.add(call)
        try:
            with noted(f"captioning {call}", table["shard"][0].as_py() if len(table) else None):
                return receipts_to_table(self._run(call, table))
        except EngineFault as error:
            self._give_up(str(error))
        finally:
            self._calls.discard(call)

    def _give_up(self, reason: str) -> NoReturn:
        """End this process: Ray starts a new one and runs its calls again. An exception would end the job."""
        # Never released: every running call meets the failure, which must count only once.
        self._giving_up.acquire()
        logger.error("The captioning engine has failed, and its process ends: %s", reason)
        with contextlib.suppress(ray.exceptions.RayError):
            calls = list(self._calls)
            ray.get(self._coordinator.device_failed.remote(self._device, reason, calls), timeout=ANSWER_S)
        os._exit(1)

    def _run(self, call: str, table: pa.Table) -> list[Receipt]:
        history: CallHistory = ray.get(self._coordinator.begin_call.remote(call))
        receipts = list(history.receipts)
        for piece in self._finish_rows(call, table, history):
            try:
                written = self._write(table, piece)
            except OSError:
                if not ray.get(self._coordinator.is_stopping.remote()):
                    raise
                break  # The job ends while its output fails; it makes these rows again when it resumes.
            receipts += written
            positions = list(ranges_of(position for position, _ in piece))
            ray.get(self._coordinator.wrote.remote(call, positions, written, self._device))
            self._report()
        ray.get(self._coordinator.end_call.remote(call))
        return receipts

    def _finish_rows(self, call: str, table: pa.Table, history: CallHistory) -> Iterator[FinishedRows]:
        """Caption the rows that are not finished; yield them in pieces, each of which is written."""
        positions = [position for position in range(len(table)) if position not in history.finished]
        if history.num_starts > 1:
            with self._lock.exclusive():
                yield from replay(self._stage, table, positions, call, history, self._coordinator)
            return
        with self._lock.shared(), self._writer.call():
            for piece in self._stage.finish_rows(table, positions, BLOCK_ROWS, PIECE_S):
                yield piece
                if ray.get(self._coordinator.is_stopping.remote()):
                    return

    def _write(self, table: pa.Table, piece: FinishedRows) -> list[Receipt]:
        """Write finished rows as fragments."""
        if not piece:
            return []
        rows = output_rows(table, piece, self._kept, self._stage)
        self._writer.write(rows)
        _log_failed(rows)
        receipts = []
        for of_shard in split_by_shard(rows):
            shard = of_shard["shard"][0].as_py()
            numbers = sorted(of_shard["row"].to_pylist())
            by_status = Counter(of_shard["status"].to_pylist())
            receipts.append(Receipt(shard, tuple(ranges_of(numbers)), tuple(sorted(by_status.items()))))
            for status, count in by_status.items():
                ROWS.inc(count, {"status": status})
        return receipts

    def _report(self) -> None:
        alive_s = time.monotonic() - self._started
        self._coordinator.report.remote("caption", self._worker, self._stage.busy_s, alive_s)
        self._coordinator.report.remote("write", self._worker, self._writer.busy_s, alive_s)


def _log_failed(rows: pa.Table) -> None:
    if not logger.isEnabledFor(logging.INFO):
        return
    failed = rows.select(["shard", "row", "status", "error"]).filter(pc.field("status") != Status.OK.value)
    for row in failed.to_pylist():
        where = {"shard": row["shard"], "row": row["row"], "status": row["status"]}
        logger.info("The row has failed: %s", row["error"], extra=where)


def _name_of(table: pa.Table) -> str:
    """Return a name for the call on a table; the name is the same when Ray runs the call again."""
    if not len(table):
        return "empty"
    return "{}:{}-{}:{}".format(table["shard"][0], table["row"][0], table["row"][len(table) - 1], len(table))
