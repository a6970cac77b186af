"""Rows from all over an input, read as the job reads them, and what reading them took."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from time import perf_counter, process_time

import pyarrow as pa

from pipeline.formats import read_shard
from pipeline.formats.tar import BUFFER_BYTES
from pipeline.inputs.evenly_spaced import evenly_spaced
from pipeline.inputs.reader import ReadOptions, ShardReport, ShardWork
from pipeline.inputs.shards import InputError, Shard

MAX_SHARDS = 16


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
    chosen = evenly_spaced(shards, min(MAX_SHARDS, math.ceil(num_rows / 2)))
    each = math.ceil(num_rows / len(chosen))
    tables: list[pa.Table] = []
    costs: list[Cost] = []
    partial: list[str] = []
    for shard in chosen:
        of_shard, spent, report = _first_tables(shard, options, each)
        tables += of_shard
        if spent:
            costs.append(_row_cost(shard, of_shard, spent))
        if report is not None and report.reason is not None:
            partial.append(report.reason)
    rows = pa.concat_tables(tables, promote_options="permissive") if tables else None
    if not rows:
        raise InputError(
            f"input must have rows, got none in {len(chosen)} shards: {'; '.join(partial) or 'all empty'}"
        )
    rows = rows.slice(0, num_rows).combine_chunks()
    cost = Cost(fmean(cost.wall_s for cost in costs), fmean(cost.cpu_s for cost in costs))
    return Sample(rows, cost, tuple(shard.name for shard in chosen), tuple(partial))


def _work(shard: Shard, num_rows: int) -> ShardWork:
    if shard.format != "folder":
        return ShardWork(shard=shard, missing=((0, num_rows),))
    rows = evenly_spaced(range(shard.limit_rows(len(shard.files))), num_rows)
    return ShardWork(shard=shard, missing=tuple((row, row + 1) for row in rows))


def _first_tables(
    shard: Shard, options: ReadOptions, num_rows: int
) -> tuple[list[pa.Table], list[Cost], ShardReport | None]:
    """Tables until so many rows are there, and what each took; two of a file, or the cost of opening it
    could not be told from that of its rows. The rest of the shard is not read, and then has no report."""
    table_rows = num_rows if shard.format == "folder" else math.ceil(num_rows / 2)
    reader = read_shard(_work(shard, num_rows), replace(options, table_rows=table_rows))
    tables, spent = list[pa.Table](), list[Cost]()
    while sum(len(table) for table in tables) < num_rows:
        started, cpu_started = perf_counter(), process_time()
        try:
            tables.append(next(reader))
        except StopIteration as end:
            return tables, spent, end.value
        spent.append(Cost(perf_counter() - started, process_time() - cpu_started))
    reader.close()
    return tables, spent, None


def _row_cost(shard: Shard, tables: Sequence[pa.Table], spent: Sequence[Cost]) -> Cost:
    """What a row takes when the whole shard is read.

    The first table of a file takes opening it and one read-ahead, which brings more rows than the sample
    asks for: they share it.
    """
    opening, *others = spent
    num_rows, brought = sum(map(len, tables)), len(tables[0])
    if shard.format != "folder":
        row_bytes = sum(table.nbytes for table in tables) / num_rows
        brought = max(brought, int(min(BUFFER_BYTES, shard.size_bytes or BUFFER_BYTES) / row_bytes))
    rest = max(1, num_rows - len(tables[0]))
    return Cost(
        opening.wall_s / brought + sum(cost.wall_s for cost in others) / rest,
        opening.cpu_s / brought + sum(cost.cpu_s for cost in others) / rest,
    )
