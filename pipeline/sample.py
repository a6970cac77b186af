"""Rows from all over an input, read as the job reads them, and what reading them took."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from time import perf_counter, process_time

import pyarrow as pa

from pipeline.extent import spread
from pipeline.formats import read_shard
from pipeline.reading import ReadOptions, ShardReport, ShardWork
from pipeline.shards import InputError, Shard

MOST_SHARDS = 16


@dataclass(frozen=True)
class Cost:
    """Seconds per row in one worker: by the clock, and of CPUs."""

    wall_s: float
    cpu_s: float


@dataclass(frozen=True)
class Sample:
    """Rows as `formats.read_shard` gives them."""

    rows: pa.Table
    cost: Cost
    shards: tuple[str, ...]
    partial: tuple[str, ...]
    """Why sampled shards could not be read to their end, where that showed."""


def take_sample(shards: Sequence[Shard], options: ReadOptions, num_rows: int) -> Sample:
    """Read rows of several shards: the first of a file, which come cheaply; of a folder, some of all over it.

    Raises:
        InputError: there are none.
    """
    chosen = spread(shards, min(MOST_SHARDS, num_rows))
    each = math.ceil(num_rows / len(chosen))
    started, cpu_started = perf_counter(), process_time()
    tables, partial = [], []
    for shard in chosen:
        of_shard, report = _first_tables(_work(shard, each), replace(options, table_rows=each), each)
        tables += of_shard
        if report is not None and report.reason is not None:
            partial.append(report.reason)
    wall_s, cpu_s = perf_counter() - started, process_time() - cpu_started
    rows = pa.concat_tables(tables, promote_options="permissive") if tables else None
    if not rows:
        raise InputError(
            f"input must have rows, got none in {len(chosen)} shards: {'; '.join(partial) or 'all empty'}"
        )
    rows = rows.slice(0, num_rows).combine_chunks()
    cost = Cost(wall_s / len(rows), cpu_s / len(rows))
    return Sample(rows, cost, tuple(shard.name for shard in chosen), tuple(partial))


def _work(shard: Shard, num_rows: int) -> ShardWork:
    if shard.format != "folder":
        return ShardWork(shard=shard, missing=((0, num_rows),))
    rows = spread(range(shard.rows_of(len(shard.files))), num_rows)
    return ShardWork(shard=shard, missing=tuple((row, row + 1) for row in rows))


def _first_tables(
    work: ShardWork, options: ReadOptions, num_rows: int
) -> tuple[list[pa.Table], ShardReport | None]:
    """Tables until so many rows are there; the rest of the shard is not read, and then has no report."""
    reader, tables = read_shard(work, options), list[pa.Table]()
    while sum(len(table) for table in tables) < num_rows:
        try:
            tables.append(next(reader))
        except StopIteration as end:
            return tables, end.value
    reader.close()
    return tables, None
