"""Shards as a Ray Datasource: one read task per shard, everything it reads fixed when the plan is made."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ray.data import Datasource

from pipeline.reading import END, READ_COLUMNS, ReadOptions, ShardReport, ShardWork, Tables
from pipeline.shards import Shard

__all__ = [
    "END", "READ_COLUMNS", "ReadOptions", "ShardReport", "ShardSource", "ShardWork",
    "check_options", "read_shard",
]  # fmt: skip


def check_options(shards: Sequence[Shard], options: ReadOptions) -> None:
    """Refuse, before Ray starts, options that the first shard of each format cannot meet.

    Raises:
        InputError: a named column does not exist or has the wrong type, or no image column is found.
    """
    raise NotImplementedError


def read_shard(work: ShardWork, options: ReadOptions) -> Tables:
    """Tables of the rows asked for, in order; the generator's return value is the ShardReport."""
    raise NotImplementedError


class ShardSource(Datasource):
    """Calls `on_end(report)` in the worker when a shard's rows have all been given; it must be picklable
    and, since Ray may run a read again, do no harm when called twice."""

    def __init__(
        self, work: Sequence[ShardWork], options: ReadOptions, on_end: Callable[[ShardReport], None]
    ) -> None:
        super().__init__()
        raise NotImplementedError
