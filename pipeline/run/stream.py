"""`ReceiptStream`: the receipts of the running dataset, as they arrive.

The dataset reads, decodes, captions and gives receipts. A thread of its own pulls it, so that the driver can
show progress, commit shards and react to signals while it waits.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import ray
from ray.data import DataContext, Dataset
from ray.data._internal.execution.streaming_executor import StreamingExecutor

from pipeline.inputs.datasource import ShardDatasource
from pipeline.inputs.reader import ShardWork
from pipeline.placement.reservations import Reservations, resolve_engine
from pipeline.run.job import Job
from pipeline.stages.coordinator import report_shard
from pipeline.stages.model_check import Models
from pipeline.stages.pools import BLOCK_ROWS, caption_pool, decode
from pipeline.stages.receipts import Receipt, receipts_from_table
from pipeline.stages.storage_trouble import tell_coordinator
from pipeline.stages.write import WriteStage

MAX_BLOCK_BYTES = 16 << 20
MIN_BLOCK_BYTES = 1 << 20
CLOSE_S = 10.0
"""How long a stream that is closed waits for its threads; on a busy machine they need some seconds."""
ASK_AGAIN_S = 0.2
"""A dataset that is only starting takes no notice of a request to stop, so it is asked again."""


def receipts_dataset(
    job: Job, work: Sequence[ShardWork], coordinator: Any, reservations: Reservations
) -> Dataset:
    """Return the job as a lazy dataset of receipts; nothing runs yet.

    Args:
        job: its workers retry requests to the output as its ledger does.
        reservations: what each stage reserves.
    """
    settings, info = job.settings, job.info
    spec = settings.spec(job.engine)
    context = DataContext.get_current().copy()
    block_bytes = min(
        BLOCK_ROWS * info.image_size_px**2 * 3,
        reservations.max_block_bytes or MAX_BLOCK_BYTES,
        MAX_BLOCK_BYTES,
    )
    context.target_max_block_size = max(MIN_BLOCK_BYTES, block_bytes)
    # Loading a model of tens of gigabytes may take longer than Ray Data waits for progress.
    context.execution_no_progress_timeout_s = -1
    with DataContext.current(context):
        source = ShardDatasource(
            work,
            settings.read_options,
            partial(report_shard, coordinator, job.ledger.folder),
            partial(tell_coordinator, coordinator),
            job.run.kept,
        )
        encoded = ray.data.read_datasource(
            source,
            override_num_blocks=source.num_tasks,
            concurrency=min(source.num_tasks, reservations.max_open_shards or source.num_tasks),
            **reservations.read.options,
        )
        decoded = decode(
            encoded,
            spec,
            info.image_size_px,
            reservations,
            coordinator=coordinator,
        )
        return decoded.map_batches(
            WriteStage,
            fn_constructor_args=(
                replace(spec, engine=resolve_engine(job.engine, reservations)),
                Models.of(spec, info),
                list(settings.reading.kept),
                job.ledger,
                coordinator,
                settings.placement.step_timeout_s,
                reservations.caption.accelerators,
            ),
            **caption_pool(settings.placement, reservations),
        )


class ReceiptStream:
    """Receipts that a thread pulls from a dataset; close it before Ray is shut down.

    Ray Data runs a dataset in threads of its own, and has no public way to stop them early. If they still
    call Ray while `ray.shutdown` runs, the process sometimes ends inside it with status 1, without a message
    and with its lease held (Ray 2.60).
    """

    def __init__(self, dataset: Dataset) -> None:
        self._executor: StreamingExecutor | None = None
        self._is_closed = False
        self._create_executor = dataset._create_executor
        dataset._create_executor = self._create_and_keep_executor
        self._queue: queue.SimpleQueue[Receipt | BaseException | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._pull, args=(dataset,), name="receipts", daemon=True)
        self._thread.start()
        self.ended = False
        """True once the last receipt was taken."""

    def take(self, timeout_s: float) -> list[Receipt]:
        """Return the receipts that have arrived; wait at most `timeout_s` seconds for the first.

        Raises:
            Exception: the error that ended the dataset early.
        """
        taken: list[Receipt] = []
        while not self.ended:
            try:
                item = self._queue.get(timeout=0 if taken else timeout_s)
            except queue.Empty:
                break
            if item is None:
                self.ended = True
            elif isinstance(item, BaseException):
                self.ended = True
                raise item
            else:
                taken.append(item)
        return taken

    def rows_by_stage(self) -> dict[str, int]:
        """Return how many rows have been read, and how many of them decoded, as Ray Data counts them.

        Rows of a call that has died and runs again count twice.
        """
        topology = None if self._executor is None else self._executor._topology
        operators = [op for op in topology or () if op.metrics.num_tasks_submitted or op.input_dependencies]
        counted = zip(("read", "decode"), operators, strict=False)
        return {stage: op.metrics.rows_task_outputs_generated for stage, op in counted}

    def close(self) -> None:
        """Stop the dataset if it still runs, and wait for its threads."""
        self._is_closed = True
        deadline = time.monotonic() + CLOSE_S
        while True:
            if self._executor is not None:
                self._executor.shutdown(force=True)
            running = self._running_thread()
            if running is None or time.monotonic() > deadline:
                return
            running.join(ASK_AGAIN_S)

    def _running_thread(self) -> threading.Thread | None:
        """Return a thread that may still call Ray: the one that pulls, or the one that runs the dataset."""
        threads = (self._thread, self._executor)
        return next((thread for thread in threads if thread is not None and thread.is_alive()), None)

    def _create_and_keep_executor(self) -> StreamingExecutor:
        self._executor = self._create_executor()
        if self._is_closed:
            raise RuntimeError("the stream was closed before its dataset started")
        return self._executor

    def _pull(self, dataset: Dataset) -> None:
        try:
            for bundle in dataset.iter_internal_ref_bundles():
                for table in ray.get(list(bundle.block_refs)):
                    for receipt in receipts_from_table(table):
                        self._queue.put(receipt)
            self._queue.put(None)
        except BaseException as error:  # Passed to the driver's thread, which raises it.
            self._queue.put(error)
