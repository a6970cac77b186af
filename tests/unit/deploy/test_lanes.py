"""Small bodies do not wait for large ones in the few threads of the event loop, as they used to."""

from __future__ import annotations

import asyncio
import threading

from deploy.http.lanes import INLINE_BYTES, NUM_LARGE, SMALL_BYTES, in_lane


def test_small_work_passes_large_work_that_does_not_end() -> None:
    may_end = threading.Event()

    async def run() -> None:
        large = [
            asyncio.ensure_future(in_lane(SMALL_BYTES + 1, lambda: may_end.wait(60)))
            for _ in range(10 * NUM_LARGE)
        ]
        try:
            async with asyncio.timeout(30):
                for _ in range(20):
                    assert await in_lane(SMALL_BYTES, threading.get_ident) != threading.get_ident()
            assert not any(task.done() for task in large)
        finally:
            may_end.set()
        assert all(await asyncio.gather(*large))

    asyncio.run(run())


def test_the_smallest_work_needs_no_thread() -> None:
    assert asyncio.run(in_lane(INLINE_BYTES, threading.get_ident)) == threading.get_ident()
