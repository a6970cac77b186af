"""Shards as a Ray Data source: one read task per shard, or per group of shards when there are many.

What a task reads is fixed when the datasource is made. Ray may run a task again to restore lost blocks and
then needs the same blocks, so a task decides nothing by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pyarrow as pa
from ray.data import Datasource
from ray.data.block import BlockMetadata
from ray.data.datasource import ReadTask

from pipeline.errors import noted
from pipeline.inputs.reader import ReadOptions, ShardReport, ShardWork
from pipeline.inputs.stamps import read_unchanged

MAX_READ_TASKS = 2000
"""Each task costs the driver milliseconds before the first row is read. On the other hand, a task that runs
again repeats fewer shards if there are more tasks."""
MAX_TASK_FILES = 50_000
"""Ray warns of tasks above 1 MiB; the slice of a folder names each of its files."""

OnEnd = Callable[[ShardReport], None]
OnStart = Callable[[], None]


class ShardDatasource(Datasource):
    """Reads shards, one after the other in each read task.

    Read it with `ray.data.read_datasource(source, override_num_blocks=source.num_tasks, concurrency=…)`.
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
        self._groups = group_work(work)
        self._options = options
        self._on_end = on_end

    @property
    def num_tasks(self) -> int:
        """Number of read tasks."""
        return len(self._groups)

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        return [
            ReadTask(
                partial(_read, group, self._options, self._kept, self._on_end, self._on_start),
                BlockMetadata(
                    num_rows=None,
                    size_bytes=_size_bytes(group),
                    input_files=[group[0].shard.uri],
                    exec_stats=None,
                ),
                per_task_row_limit=per_task_row_limit,
            )
            for group in self._groups
        ]


def group_work(work: Sequence[ShardWork]) -> list[tuple[ShardWork, ...]]:
    """Divide work into groups of neighbors; the last groups are smaller, so that all workers end together."""
    if len(work) <= MAX_READ_TASKS:
        return [(one,) for one in work]
    groups: list[tuple[ShardWork, ...]] = []
    start = 0
    while start < len(work):
        num_left = len(work) - start
        # Twice the average of what is left, so that the sizes fall evenly to one.
        size = -(-2 * num_left // max(2, MAX_READ_TASKS - len(groups)))
        stop = start + max(1, min(size, MAX_TASK_FILES // len(work[start].shard.files)))
        groups.append(tuple(work[start:stop]))
        start = stop
    return groups


def _size_bytes(group: Sequence[ShardWork]) -> int | None:
    sizes = [work.shard.size_bytes for work in group]
    return None if None in sizes else sum(size for size in sizes if size is not None)


def _read(
    group: Sequence[ShardWork],
    options: ReadOptions,
    kept: pa.Schema | None,
    on_end: OnEnd,
    on_start: OnStart | None,
) -> Iterator[pa.Table]:
    if on_start is not None:
        on_start()
    for work in group:
        with noted(f"reading {work.shard.uri}", work.shard.name):
            report = yield from read_unchanged(work, options, kept)
            on_end(report)
