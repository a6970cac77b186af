"""The job's last stage: captions are written as fragments by the call that made them.

What goes on are small receipts; captions never cross the object store. A call that has died before
runs alone in its process and in small steps, so that the row that kills is found.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.util import metrics

from blip2_actor import EngineBuilder, ModelInfo, Result, Status
from pipeline.inputs.reader import PROMPT, TEXT
from pipeline.ledger.fragments import write_fragment
from pipeline.ledger.rowset import RowSet, ranges_of
from pipeline.schema import output_schema
from pipeline.settings.settings import CaptionSettings
from pipeline.stages.caption import CaptionStage, EngineFault, FinishedRows
from pipeline.stages.coordinator import Attempt, Receipt
from pipeline.stages.row_result import RowResult
from pipeline.storage.folder import Folder

FRAGMENT_ROWS = 256
FRAGMENT_S = 2.0
"""A fragment is written when either is reached: at most so much of a call is ever done twice."""
CAREFUL_ROWS = 32
"""Rows that run together after their call has died once: few enough to go on soon, enough for a batch."""

RECEIPTS = pa.schema(
    [
        ("shard", pa.string()),
        ("starts", pa.list_(pa.int64())),
        ("stops", pa.list_(pa.int64())),
        ("statuses", pa.list_(pa.string())),
        ("counts", pa.list_(pa.int64())),
    ]
)

logger = logging.getLogger(__name__)


class FragmentStage:
    """Captions tables of the decode stage into fragments; several calls run at once in one actor."""

    def __init__(
        self,
        engine: EngineBuilder,
        info: ModelInfo,
        score_digest: str | None,
        settings: CaptionSettings,
        folder: Folder,
        coordinator: Any,
    ) -> None:
        """Start an engine.

        Args:
            info: what the driver found the model to be, and has put into the run's fingerprint;
            score_digest: and the retrieval checkpoint that scores, if one does.
            board: handle of the job's `Coordinator` actor.

        Raises:
            ValueError: this machine finds the model to be another one.
        """
        _require_same_model(info, engine.info())
        found = settings.outputs.score_digest(engine, info)
        if found != score_digest:
            raise ValueError(
                f"score_model must be the same on every machine, got other files at "
                f"{settings.outputs.score_model} where the job runs than where it was started; "
                "name a place that all machines share"
            )
        self._stage = caption_stage(engine, settings)
        self._kept = list(settings.reading.kept)
        self._folder = folder
        self._coordinator = coordinator
        self._lock = SharedExclusiveLock()
        self._rows = metrics.Counter("blip2_rows", "Rows that have reached a fragment.", tag_keys=("status",))
        self._worker = f"{os.uname().nodename}-{os.getpid()}"
        self._started, self._write_s = time.monotonic(), 0.0

    def __call__(self, table: pa.Table) -> pa.Table:
        call = _name_of(table)
        attempt: Attempt = ray.get(self._coordinator.begin.remote(call))
        receipts = list(attempt.receipts)
        try:
            for positions, written in self._run(call, table, attempt):
                receipts += written
                ray.get(self._coordinator.wrote.remote(call, positions, written))
        except EngineFault:
            # Ray starts a fresh process and runs its calls again; an exception would end the whole job.
            logger.exception("The captioning engine has failed; its process ends and is started afresh")
            os._exit(1)
        ray.get(self._coordinator.end.remote(call))
        self._report()
        return _receipts_table(receipts)

    def _run(
        self, call: str, table: pa.Table, attempt: Attempt
    ) -> Iterator[tuple[list[tuple[int, int]], list[Receipt]]]:
        """Caption what is not finished; yield positions and receipts of each fragment written."""
        finished = RowSet(attempt.finished)
        todo = [row for row in range(len(table)) if row not in finished]
        if attempt.number == 1:
            with self._lock.shared():
                for piece in self._stage.finish_rows(table, todo, FRAGMENT_ROWS, FRAGMENT_S):
                    yield list(ranges_of(row for row, _ in piece)), self._write(table, piece)
                    if ray.get(self._coordinator.is_stopping.remote()):
                        return
            return
        with self._lock.exclusive():
            for step in careful_steps(todo, RowSet(attempt.suspects)):
                if ray.get(self._coordinator.is_stopping.remote()):
                    return
                if step[0] in attempt.condemned:
                    piece = [(step[0], _condemned())]
                else:
                    ray.get(self._coordinator.trying.remote(call, step[0], step[-1] + 1))
                    piece = [pair for part in self._stage.finish_rows(table, step) for pair in part]
                yield list(ranges_of(step)), self._write(table, piece)

    def _write(self, table: pa.Table, piece: FinishedRows) -> list[Receipt]:
        if not piece:
            return []
        started = time.monotonic()
        rows = self._stage.with_results(table, piece)
        receipts = []
        for shard in pc.unique(rows["shard"]).to_pylist():
            of_shard = contract(rows.filter(pc.equal(rows["shard"], shard)), self._kept, self._stage)
            write_fragment(self._folder, of_shard)
            numbers = sorted(of_shard["row"].to_pylist())
            by_status = Counter(of_shard["status"].to_pylist())
            receipts.append(Receipt(shard, tuple(ranges_of(numbers)), tuple(sorted(by_status.items()))))
            for status, count in by_status.items():
                self._rows.inc(count, {"status": status})
        self._write_s += time.monotonic() - started
        return receipts

    def _report(self) -> None:
        alive_s = time.monotonic() - self._started
        busy_s = self._stage.busy_s
        self._coordinator.report.remote("caption", self._worker, busy_s, alive_s)
        self._coordinator.report.remote("write", self._worker, self._write_s, alive_s)


def _require_same_model(expected: ModelInfo, found: ModelInfo) -> None:
    if found.dtype != expected.dtype:
        raise ValueError(
            f"dtype must be the same on every machine, got {expected.dtype} where the job was started and "
            f"{found.dtype} where it runs; add --dtype {found.dtype}"
        )
    if found.digest != expected.digest:
        raise ValueError(
            f"model must be the same on every machine, got other files at {found.model} where the job runs "
            "than where it was started; name a place that all machines share"
        )


def caption_stage(engine: EngineBuilder, settings: CaptionSettings) -> CaptionStage:
    """The stage that makes what a job asks for, of tables as the job's readers make them."""
    return CaptionStage(
        engine,
        settings.generation,
        settings.prompt,
        PROMPT if settings.reading.prompt_column else None,
        settings.outputs,
        settings.reuse_identical,
        TEXT,
    )


def contract(rows: pa.Table, kept: Sequence[str], stage: CaptionStage) -> pa.Table:
    """Exactly the columns of the output, in order and with the contract's types."""
    schema = output_schema((rows.schema.field(name) for name in kept), stage.named, stage.captioned)
    arrays = [
        rows[field.name].cast(field.type)
        if field.name in rows.column_names
        else pa.nulls(len(rows), field.type)
        for field in schema
    ]
    return pa.table(arrays, schema=schema)


def _condemned() -> RowResult:
    error = "the captioning process died each time on this image alone"
    return RowResult(Result(status=Status.FAILED, error=error))


def careful_steps(todo: Sequence[int], suspects: RowSet) -> Iterator[list[int]]:
    """Runs of neighbouring positions of at most CAREFUL_ROWS; suspects one by one."""
    step: list[int] = []
    for row in todo:
        if step and (row in suspects or row != step[-1] + 1 or len(step) == CAREFUL_ROWS):
            yield step
            step = []
        step.append(row)
        if row in suspects:
            yield step
            step = []
    if step:
        yield step


def _name_of(table: pa.Table) -> str:
    """The same table has the same name when Ray runs its call again."""
    if not len(table):
        return "empty"
    return "{}:{}-{}:{}".format(table["shard"][0], table["row"][0], table["row"][len(table) - 1], len(table))


def _receipts_table(receipts: Sequence[Receipt]) -> pa.Table:
    return pa.table(
        {
            "shard": [receipt.shard for receipt in receipts],
            "starts": [[start for start, _ in receipt.ranges] for receipt in receipts],
            "stops": [[stop for _, stop in receipt.ranges] for receipt in receipts],
            "statuses": [[status for status, _ in receipt.by_status] for receipt in receipts],
            "counts": [[count for _, count in receipt.by_status] for receipt in receipts],
        },
        schema=RECEIPTS,
    )


def receipts_of(table: pa.Table) -> Iterator[Receipt]:
    for row in table.to_pylist():
        yield Receipt(
            row["shard"],
            tuple(zip(row["starts"], row["stops"], strict=True)),
            tuple(zip(row["statuses"], row["counts"], strict=True)),
        )


class SharedExclusiveLock:
    """Many calls share the process, or one has it alone; who wants it alone comes first."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._inside = 0
        self._want_alone = 0
        self._taken = False

    @contextmanager
    def shared(self) -> Iterator[None]:
        with self._condition:
            self._condition.wait_for(lambda: not self._taken and not self._want_alone)
            self._inside += 1
        try:
            yield
        finally:
            with self._condition:
                self._inside -= 1
                self._condition.notify_all()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        with self._condition:
            self._want_alone += 1
            self._condition.wait_for(lambda: not self._taken and not self._inside)
            self._want_alone -= 1
            self._taken = True
        try:
            yield
        finally:
            with self._condition:
                self._taken = False
                self._condition.notify_all()
