"""The size of an input: rows are counted if the formats know them, and extrapolated by bytes otherwise.

Counting every row of a tar means reading it. So only the first rows of a few tars are scanned, and the
rows per byte found there are applied to the bytes of all the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from pipeline.inputs.evenly_spaced import evenly_spaced
from pipeline.inputs.formats import webdataset
from pipeline.inputs.formats.tables import parquet
from pipeline.inputs.reader import ReadOptions
from pipeline.inputs.shards import Shard
from pipeline.storage.filesystems import at_once

MAX_SCANNED_TARS = 16
SCANNED_ROWS_PER_TAR = 64
"""Number of rows that are scanned; a store is asked for little more than these."""
MAX_FOOTERS = 1000


@dataclass(frozen=True, kw_only=True)
class SizeEstimate:
    """Rows and bytes of all shards of an input."""

    num_shards: int
    num_bytes: int | None
    """None if the listing does not tell the bytes of every shard."""
    num_rows: int
    min_rows: int
    """Rows if all other tars were as sparse as the sparsest scanned one."""
    max_rows: int
    """Rows if all other tars were as dense as the densest scanned one."""
    is_counted: bool
    """True if every row was counted, so that the three numbers of rows are equal and exact."""


@dataclass(frozen=True, kw_only=True)
class _Scan:
    """What was found in one shard whose number of rows the listing does not know."""

    num_rows: int
    num_bytes: int
    """Bytes that hold these rows."""
    is_whole: bool
    """Whether these are all rows of the shard."""


def estimate_size(
    shards: Sequence[Shard], limit: int | None = None, options: ReadOptions = ReadOptions()
) -> SizeEstimate:
    """Count or extrapolate the rows of an input; read file footers and the first rows of some tars.

    Args:
        shards: the list that `list_shards` has made with the same `limit`.
        limit: maximum number of rows of the whole input.
        options: which members of a tar are rows.
    """
    uncounted = [shard for shard in shards if shard.num_rows is None]
    tables = evenly_spaced([shard for shard in uncounted if shard.format == "parquet"], MAX_FOOTERS)
    tars = evenly_spaced([shard for shard in uncounted if shard.format == "webdataset"], MAX_SCANNED_TARS)
    scans = at_once(partial(_scan, options=options), [*tables, *tars])
    counted = sum(shard.num_rows or 0 for shard in shards)
    is_counted = len(scans) == len(uncounted) and all(scan.is_whole for scan in scans)
    if limit is not None and any(shard.max_rows is not None for shard in shards):
        # The limit cuts one of the shards, so the listing has counted the rows up to the limit.
        counted, guesses, is_counted = limit, (0, 0, 0), True
    elif is_counted:
        guesses = (sum(scan.num_rows for scan in scans),) * 3
    elif any(shard.size_bytes is None for shard in uncounted):
        per_file = [replace(scan, num_bytes=1) for scan in scans]  # of more rows: not all of a tar is scanned
        guesses = _extrapolate(per_file, len(uncounted))
    else:
        guesses = _extrapolate(scans, sum(shard.size_bytes or 0 for shard in uncounted))
    num_rows, min_rows, max_rows = (min(counted + guess, limit or counted + guess) for guess in guesses)
    sizes = [shard.size_bytes for shard in shards]
    return SizeEstimate(
        num_shards=len(shards),
        num_bytes=None if None in sizes else sum(size or 0 for size in sizes),
        num_rows=num_rows,
        min_rows=min_rows,
        max_rows=max_rows,
        is_counted=is_counted,
    )


def _scan(shard: Shard, options: ReadOptions) -> _Scan:
    num_bytes = None
    if shard.format == "parquet":
        num_rows = parquet.count_rows(shard, options)
    else:
        num_rows, num_bytes = webdataset.scan_first_rows(shard, SCANNED_ROWS_PER_TAR, options)
    if num_bytes is None:
        return _Scan(num_rows=num_rows, num_bytes=shard.size_bytes or 0, is_whole=True)
    return _Scan(num_rows=num_rows, num_bytes=num_bytes, is_whole=False)


def _extrapolate(scans: Sequence[_Scan], num_bytes: int) -> tuple[int, int, int]:
    """Return how many rows `num_bytes` hold: at the average, lowest and highest density of the scans."""
    densities = [scan.num_rows / scan.num_bytes for scan in scans if scan.num_bytes]
    if not densities:
        return 0, 0, 0
    average = sum(scan.num_rows for scan in scans) / sum(scan.num_bytes for scan in scans)
    return round(num_bytes * average), round(num_bytes * min(densities)), round(num_bytes * max(densities))
