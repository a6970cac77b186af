"""How large an input is: rows counted where the formats know them, extrapolated by bytes where not."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from pipeline.formats import count_rows, webdataset
from pipeline.inputs.shards import Shard

T = TypeVar("T")
MAX_WALKED_TARS = 16
WALKED_ROWS = 64
"""Of each such tar: a store is asked for little more than these rows."""
MAX_FOOTERS = 1000
AT_ONCE = 16


@dataclass(frozen=True, kw_only=True)
class SizeEstimate:
    """Rows and bytes of all shards of an input."""

    num_shards: int
    num_bytes: int | None
    """Where the listing tells."""
    num_rows: int
    min_rows: int
    max_rows: int
    """What the sparsest and the densest of the walked shards would make of the others."""
    is_counted: bool


def estimate_size(shards: Sequence[Shard], limit: int | None = None) -> SizeEstimate:
    """Count or extrapolate; reads file footers and the beginnings of some tars."""
    uncounted = [shard for shard in shards if shard.num_rows is None]
    footers = spread([shard for shard in uncounted if shard.format == "parquet"], MAX_FOOTERS)
    tars = spread([shard for shard in uncounted if shard.format == "webdataset"], MAX_WALKED_TARS)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        walked = list(pool.map(_rows_and_bytes, [*footers, *tars]))
    counted = sum(shard.num_rows or 0 for shard in shards)
    is_counted = len(walked) == len(uncounted) and all(is_whole for *_, is_whole in walked)
    if limit is not None and any(shard.max_rows is not None for shard in shards):
        # The listing has counted up to the limit, which falls into this shard.
        counted, guesses, is_counted = limit, (0, 0, 0), True
    elif is_counted:
        guesses = (sum(rows for rows, *_ in walked),) * 3
    else:
        guesses = _extrapolate(walked, sum(shard.size_bytes or 0 for shard in uncounted))
    typical, least, most = (min(counted + guess, limit or counted + guess) for guess in guesses)
    sizes = [shard.size_bytes for shard in shards]
    return SizeEstimate(
        num_shards=len(shards),
        num_bytes=None if None in sizes else sum(size or 0 for size in sizes),
        num_rows=typical,
        min_rows=least,
        max_rows=most,
        is_counted=is_counted,
    )


def spread(items: Sequence[T], at_most: int) -> list[T]:
    """So many items at most, at even distances."""
    number = min(len(items), at_most)
    return [items[at * len(items) // number] for at in range(number)]


def _rows_and_bytes(shard: Shard) -> tuple[int, int, bool]:
    """Rows, the bytes that hold them, and whether these are all."""
    size_bytes = shard.size_bytes or 0
    if shard.format == "parquet":
        return count_rows(shard, 1 << 62), size_bytes, True
    rows, num_bytes = webdataset.first_rows(shard, WALKED_ROWS)
    return rows, size_bytes if num_bytes is None else num_bytes, num_bytes is None


def _extrapolate(walked: Sequence[tuple[int, int, bool]], num_bytes: int) -> tuple[int, int, int]:
    """Rows that so many bytes hold: typical, least, most."""
    densities = [rows / size for rows, size, _ in walked if rows and size]
    if not densities:
        return 0, 0, 0
    typical = sum(rows for rows, *_ in walked) / sum(size for _, size, _ in walked)
    return round(num_bytes * typical), round(num_bytes * min(densities)), round(num_bytes * max(densities))
