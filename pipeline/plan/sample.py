"""Sample rows from all over an input, read as the job reads them, and measure what reading costs a row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import pyarrow as pa

from pipeline.errors import InputError
from pipeline.inputs.evenly_spaced import evenly_spaced
from pipeline.inputs.formats import read_shard
from pipeline.inputs.formats.tar import BUFFER_BYTES
from pipeline.inputs.reader import ReadOptions, ShardReport, ShardWork
from pipeline.inputs.shards import Shard
from pipeline.plan.cost import Cost, measure
from pipeline.rowset import ranges_of

MAX_SHARDS = 16


@dataclass(frozen=True)
class Sample:
    """Rows from several shards, as `formats.read_shard` gives them."""

    rows: pa.Table
    cost: Cost
    """Reading one row, when whole shards are read."""
    shards: tuple[str, ...]
    """Names of the sampled shards."""
    partial: tuple[str, ...]
    """Why sampled shards cannot be read to their end, as far as the sample shows it."""


def take_sample(shards: Sequence[Shard], options: ReadOptions, num_rows: int) -> Sample:
    """Read rows of several shards.

    The first rows of a file are read, because the others would cost more. Of a folder, whose files can be
    read in any order, rows are taken at equal distances.

    Args:
        shards: all shards of the input.
        options: which columns or members are read.
        num_rows: maximum number of rows in the sample.

    Raises:
        InputError: the sampled shards have no rows.
    """
    chosen = evenly_spaced(shards, min(MAX_SHARDS, math.ceil(num_rows / 2)))
    rows_per_shard = math.ceil(num_rows / len(chosen))
    tables: list[pa.Table] = []
    costs: list[Cost] = []
    partial: list[str] = []
    for shard in chosen:
        shard_tables, table_costs, report = _read_first_tables(shard, options, rows_per_shard)
        tables += shard_tables
        if table_costs:
            costs.append(_row_cost(shard, shard_tables, table_costs))
        if report is not None and report.reason is not None:
            partial.append(report.reason)
    rows = pa.concat_tables(tables, promote_options="permissive") if tables else None
    if not rows:
        reasons = "; ".join(partial) or "all are empty"
        raise InputError(f"the input has no rows in {len(chosen)} sampled shards: {reasons}")
    rows = rows.slice(0, num_rows).combine_chunks()
    cost = Cost(fmean(cost.wall_s for cost in costs), fmean(cost.cpu_s for cost in costs))
    return Sample(rows, cost, tuple(shard.name for shard in chosen), tuple(partial))


def _sample_work(shard: Shard, num_rows: int) -> ShardWork:
    if shard.format != "folder":
        return ShardWork(shard=shard, missing=((0, num_rows),))
    rows = evenly_spaced(range(shard.limit_rows(len(shard.files))), num_rows)
    return ShardWork(shard=shard, missing=tuple(ranges_of(rows)))


def _read_first_tables(
    shard: Shard, options: ReadOptions, num_rows: int
) -> tuple[list[pa.Table], list[Cost], ShardReport | None]:
    """Read tables of a shard until they have `num_rows` rows.

    A file is read in two tables, because the cost of opening it is part of the first one only.

    Returns:
        The tables, the cost of each, and the shard's report, or None if the shard was not read to its end.
    """
    table_rows = num_rows if shard.format == "folder" else math.ceil(num_rows / 2)
    reader = read_shard(_sample_work(shard, num_rows), replace(options, table_rows=table_rows))
    tables, costs = list[pa.Table](), list[Cost]()
    while sum(len(table) for table in tables) < num_rows:
        try:
            table, cost = measure(next, reader)
        except StopIteration as end:
            return tables, costs, end.value
        tables.append(table)
        costs.append(cost)
    reader.close()
    return tables, costs, None


def _row_cost(shard: Shard, tables: Sequence[pa.Table], costs: Sequence[Cost]) -> Cost:
    """Return what a row costs when the whole shard is read.

    The first table of a file includes opening it and one read-ahead, which brings more rows than the
    sample asks for. All rows of the read-ahead share its cost.
    """
    first, *others = costs
    num_rows, opened_rows = sum(map(len, tables)), len(tables[0])
    if shard.format != "folder":
        row_bytes = sum(table.nbytes for table in tables) / num_rows
        read_ahead_bytes = min(BUFFER_BYTES, shard.size_bytes or BUFFER_BYTES)
        opened_rows = max(opened_rows, int(read_ahead_bytes / row_bytes))
    other_rows = max(1, num_rows - len(tables[0]))
    return Cost(
        first.wall_s / opened_rows + sum(cost.wall_s for cost in others) / other_rows,
        first.cpu_s / opened_rows + sum(cost.cpu_s for cost in others) / other_rows,
    )
