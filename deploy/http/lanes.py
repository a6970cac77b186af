"""Threads for parsing, base64 and hashes: large bodies have their own, and small ones never wait for them.

The event loop's own threads are few (six on two cores). A handful of large bodies occupied all of them for
seconds, while the small requests of all other callers waited.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

INLINE_BYTES = 64 << 10
"""Up to this size, no thread is worth its cost: the most hostile form takes 3 ms."""
SMALL_BYTES = 1 << 20
NUM_SMALL, NUM_LARGE = 4, 2

_small = ThreadPoolExecutor(NUM_SMALL, "small-bodies")
_large = ThreadPoolExecutor(NUM_LARGE, "large-bodies")


async def in_lane(num_bytes: int, call: Callable[[], T]) -> T:
    """Return the result of a call, run in the lane for this many bytes."""
    if num_bytes <= INLINE_BYTES:
        return call()
    lane = _small if num_bytes <= SMALL_BYTES else _large
    return await asyncio.get_running_loop().run_in_executor(lane, call)
