"""The bytes of requests that are in this process, and how long a body may take to arrive.

Bodies are gathered here, where an upload that is slow or never ends costs its bytes once. Passed on piece by
piece, they would also be in the gateway, and in Ray's object store, which takes a second to free a piece.

A small body is sent to the gateway with its request. Serve itself would make two calls from the gateway back
to the proxy, one for the body and one to learn that the client has left, which cancels the request in any
case. Without them, proxy and gateway use a quarter less CPU time for a request.
"""

from __future__ import annotations

import asyncio
import ctypes
from collections import Counter
from collections.abc import Mapping
from typing import Any

from starlette.types import Message, Receive, Scope

from deploy.http.errors import ApiError, bad_request, overloaded
from deploy.settings import BODY_WITHIN_S

MAX_BYTES = 256 << 20
"""Bytes of all requests that one proxy holds at once."""
SMALL_BYTES = 1 << 20
"""A quarter of `MAX_BYTES` is reserved for bodies up to this size."""
PASSED_BYTES = 64 << 10
"""Bodies up to this size are sent with their request. Ray puts larger arguments into its object store."""
PASSED_BODY = "blip2.body"
"""The key of the ASGI scope that holds such a body."""
MAX_COMMAS = 100_000
"""Maximum number of commas in JSON. Every value but the first follows one, and while JSON is parsed, no other
thread runs: 27 MB of empty lists would stop the event loop for seconds."""
BODY_PAUSE_S = 10.0
"""Maximum seconds between two pieces of a body."""
_M_MMAP_THRESHOLD = -3
"""glibc's number of the setting, from its `malloc.h`."""


def give_back_large_memory() -> None:
    """Have this process give the memory of each large body back to the system as soon as it is freed.

    By default, glibc does so only until it has freed such a block once. From then on it cuts blocks of up to
    32 MiB out of its heap, where bodies that grow side by side leave holes: 256 MiB of bodies took 900 MiB.
    With another C library than glibc, nothing changes.
    """
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(_M_MMAP_THRESHOLD, SMALL_BYTES)


def take_passed_bodies() -> None:
    """Have the Serve replica of this process find bodies where the front of the proxy has put them.

    Serve has no setting for this (Ray 2.60). It also looks up the actor of the proxy for each request, which
    is needed only if the body has to be fetched.
    """
    from ray.exceptions import TaskCancelledError
    from ray.serve._private import replica
    from ray.serve._private.common import StreamingHTTPRequest

    class Received(replica.ASGIReceiveProxy):
        """ASGI `receive`. A body that was not passed on, as behind a proxy without our front, is fetched."""

        def __init__(self, scope: Scope, *arguments: Any) -> None:
            super().__init__(scope, *arguments)
            self._passed: bytes | None = scope.pop(PASSED_BODY, None)

        async def fetch_until_disconnect(self) -> None:
            if self._passed is None:
                await super().fetch_until_disconnect()
            else:
                self.queue.put_nowait({"type": "http.request", "body": self._passed, "more_body": False})

        async def __call__(self) -> Message:
            try:
                return await super().__call__()
            except TaskCancelledError:  # the proxy has ended the request, because its client has left
                return {"type": "http.disconnect"}

    of_proxy = StreamingHTTPRequest.receive_asgi_messages.fget

    def ask_when_called(request: StreamingHTTPRequest) -> Any:
        return lambda metadata: of_proxy(request)(metadata)

    if replica.ASGIReceiveProxy.__name__ != Received.__name__:
        replica.ASGIReceiveProxy = Received
        StreamingHTTPRequest.receive_asgi_messages = property(ask_when_called)


class Uploads:
    """Counts the bytes of the bodies in this process, and what each client sends or has announced."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        """Bytes of bodies in this process."""
        self.num_claimed_of: Counter[str] = Counter()
        """Bytes that each client has announced or sent."""
        self.num_complete = 0
        """Counted requests whose body has arrived and that have no answer yet."""


class Body:
    """ASGI `receive` that returns the whole body; one that breaks a limit ends as if its client had left.

    Large bodies leave a quarter of the bytes to small ones, and one client never has more than half. What it
    announces counts from the start: otherwise its bodies would begin side by side, none would fit, and it
    would send all of them again.
    """

    def __init__(
        self,
        uploads: Uploads,
        client: str,
        receive: Receive,
        headers: Mapping[bytes, bytes],
        *,
        is_counted: bool = True,
    ) -> None:
        """Watch the body that a client sends; `release` gives its bytes back.

        Args:
            headers: of its request.
            is_counted: whether its request counts in `num_complete`.
        """
        self.refusal: ApiError | None = None
        """Why the body was not received to its end."""
        self.is_complete = False
        """Whether all of it has arrived."""
        self.has_left = False
        """Whether the client has closed its connection, before or after the end of the body."""
        self._declared_bytes = int(headers.get(b"content-length", b"0"))
        self.is_small = self._declared_bytes <= PASSED_BYTES and b"transfer-encoding" not in headers
        """Whether it is announced to have at most `PASSED_BYTES`."""
        media = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        self._is_json = media == b"application/json"
        self._uploads = uploads
        self._client = client
        self._receive = receive
        self._num_bytes = 0
        self._num_claimed = 0
        self._is_counted = is_counted
        self._num_commas = 0
        self._again: Message | None = None
        self._late_at_s = asyncio.get_running_loop().time() + BODY_WITHIN_S

    def give_again(self, message: Message) -> None:
        """Have the next call return a message again, for a gateway that fetches what was passed on."""
        self._again = message

    async def __call__(self) -> Message:
        if self._again is not None:
            message, self._again = self._again, None
            return message
        if self.is_complete:
            return await self._next()  # waits until the client has left
        try:
            # What cannot fit is refused before any of it is here.
            self._claim(self._declared_bytes)
            self._require_room(self._declared_bytes)
            async with asyncio.timeout_at(self._late_at_s):
                return await self._gather()
        except TimeoutError:
            self.refusal = ApiError(
                408,
                "body_late",
                f"the body must come within {BODY_WITHIN_S:g} s, with pauses of at most {BODY_PAUSE_S:g} s",
            )
        except ApiError as refusal:
            # Its traceback would keep the bytes until the next garbage collection.
            self.refusal = refusal.with_traceback(None)
        return {"type": "http.disconnect"}

    async def _gather(self) -> Message:
        """Return the whole body as one message, or the message that the client has left."""
        body = bytearray()
        while True:
            async with asyncio.timeout(BODY_PAUSE_S):
                message = await self._next()
            if message["type"] != "http.request":
                return message
            piece = message.get("body", b"")
            self._hold(piece)
            body += piece
            if not message.get("more_body", False):
                self.is_complete = True
                self._uploads.num_complete += self._is_counted
                return {"type": "http.request", "body": bytes(body), "more_body": False}

    async def _next(self) -> Message:
        message = await self._receive()
        self.has_left = message["type"] == "http.disconnect"
        return message

    def _hold(self, piece: bytes) -> None:
        """Count a piece that has arrived; raise ApiError if it is too much."""
        if self._num_bytes + len(piece) > self._num_claimed:  # it was not announced
            self._claim(len(piece))
        self._require_room(len(piece))
        self._num_bytes += len(piece)
        self._uploads.num_bytes += len(piece)
        # Gateways refuse such JSON too; here, most of it has not arrived yet.
        self._num_commas += piece.count(b",") if self._is_json else 0
        if self._num_commas > MAX_COMMAS:
            raise bad_request(f"body must have at most {MAX_COMMAS} commas")

    def _claim(self, num_bytes: int) -> None:
        """Count further bytes that the client sends or has announced.

        Raises:
            ApiError: 413 if the body alone exceeds the limit of one client, 429 if all its bodies do.
        """
        of_client, limit = self._uploads.num_claimed_of, self._uploads.max_bytes // 2
        if self._num_claimed + num_bytes > limit:
            raise ApiError(413, "too_large", f"a body must have at most {limit} bytes")
        is_small = self._num_claimed + num_bytes <= SMALL_BYTES
        if not is_small and of_client[self._client] + num_bytes > limit:
            message = f"requests of one client may have at most {limit} bytes at once"
            raise ApiError(429, "too_many_bytes", message, retry_after_s=BODY_PAUSE_S)
        of_client[self._client] += num_bytes
        self._num_claimed += num_bytes

    def _require_room(self, num_bytes: int) -> None:
        """Raise ApiError 503 if further bytes do not fit next to those of all bodies."""
        is_small = self._num_bytes + num_bytes <= SMALL_BYTES
        limit = self._uploads.max_bytes if is_small else self._uploads.max_bytes * 3 // 4
        if self._uploads.num_bytes + num_bytes > limit:
            raise overloaded("too many bytes of other requests are being received", BODY_PAUSE_S)

    def release(self) -> None:
        """Release its bytes; call it once, at the end."""
        uploads = self._uploads
        uploads.num_bytes -= self._num_bytes
        uploads.num_claimed_of[self._client] -= self._num_claimed
        if not uploads.num_claimed_of[self._client]:
            del uploads.num_claimed_of[self._client]
        uploads.num_complete -= self.is_complete and self._is_counted
