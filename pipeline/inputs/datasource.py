"""Shards as a Ray Data source: one read task per shard.

All that a task reads is fixed when the datasource is made. Ray may run a task again to restore lost
blocks and then needs the same blocks, so a task decides nothing by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pyarrow as pa
from ray.data import Datasource
from ray.data.block import BlockMetadata
from ray.data.datasource import ReadTask

from pipeline.inputs.reader import ReadOptions, ShardReport, ShardWork
from pipeline.inputs.stamps import read_unchanged

OnEnd = Callable[[ShardReport], None]
OnStart = Callable[[], None]


class ShardDatasource(Datasource):
    """Reads each piece of work in a read task of its own.

    Read it with `ray.data.read_datasource(source, override_num_blocks=len(work), concurrency=…)`.
    Without `override_num_blocks` Ray splits the tables of a few shards into blocks of a few rows.

    Args:
        work: the shards, each with the rows that are still to read. Finished rows do not appear here.
        options: which columns or members are read.
        on_end: called in the worker when the last table of a shard has been taken, whether the shard
            was whole or not. It must be picklable, and a second call for a shard must do no harm.
        on_start: called in the worker before a shard is read; picklable.
        kept: the kept columns as all files of the output have them; see `read_shard`.
    """

    def __init__(
        self,
        work: Sequence[ShardWork],
        options: ReadOptions,
        on_end: OnEnd,
        on_start: OnStart | None = None,
        kept: pa.Schema | None = None,
    ) -> None:
        super().__init__()
        self._on_start = on_start
        self._kept = kept
        self._work = tuple(work)
        self._options = options
        self._on_end = on_end

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        return [
            ReadTask(
                partial(_read, work, self._options, self._kept, self._on_end, self._on_start),
                BlockMetadata(
                    num_rows=None,
                    size_bytes=work.shard.size_bytes,
                    input_files=[work.shard.uri],
                    exec_stats=None,
                ),
                per_task_row_limit=per_task_row_limit,
            )
            for work in self._work
        ]


def _read(
    work: ShardWork, options: ReadOptions, kept: pa.Schema | None, on_end: OnEnd, on_start: OnStart | None
) -> Iterator[pa.Table]:
    if on_start is not None:
        on_start()
    report = yield from read_unchanged(work, options, kept)
    on_end(report)
