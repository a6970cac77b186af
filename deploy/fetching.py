"""Fetch the images of requests from the hosts that the service allows, away from the event loop.

`blip2_actor.fetch_image` is the guard. Here are its threads, the line before them, and the answers for what
cannot be fetched.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from blip2_actor import FetchError, FetchPolicy, fetch_image
from deploy.guard.callers import CALLER
from deploy.guard.fair_gate import FairGate
from deploy.http.errors import ApiError
from deploy.http.images import ImageUrl

NUM_THREADS = 32
"""Images that one gateway fetches at once."""


class Fetching:
    """Threads that fetch images; when all are busy, callers take turns."""

    def __init__(self, policy: FetchPolicy, num_threads: int = NUM_THREADS) -> None:
        self._policy = policy
        self._threads = ThreadPoolExecutor(num_threads, "fetch")
        self._gate = FairGate(num_threads, small_work=1)

    async def fetch(self, image: ImageUrl) -> bytes:
        """Return the bytes behind a URL.

        Raises:
            ApiError: 400 the URL is not allowed, 413 the image is too large, 422 it cannot be fetched.
        """
        leave = await self._gate.enter(1, 1, CALLER.get().name)
        call = asyncio.get_running_loop().run_in_executor(self._threads, fetch_image, image.url, self._policy)
        # The thread is busy until the image is there, even if the caller has left.
        call.add_done_callback(lambda _: leave())
        try:
            return await asyncio.shield(call)
        except FetchError as error:
            raise _answer(image.field, error) from None

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


def _answer(field: str, error: FetchError) -> ApiError:
    if error.reason == "address":  # the caller does not learn the addresses of this network
        return ApiError(400, "url_refused", f"{field}: the URL must lead to a public address")
    if error.reason in ("url", "host"):
        return ApiError(400, "url_refused", f"{field}: {error}")
    if error.reason == "size":
        return ApiError(413, "too_large", f"{field}: {error}")
    return ApiError(422, "url_unreadable", f"{field}: {error}")
