"""The bytes of requests that are in this process, and how long a body may take to come.

Bodies are gathered here, where an upload that is slow or never ends costs its bytes once. Passed on piece by
piece, it would have them in the gateway too, and in Ray's object store, which takes a second to free a piece.

A small body goes to the gateway with its request. Serve's way is two calls from the gateway back to the
proxy, one for the body and one to hear that the client has left, which cancels the request in any case.
Without them, proxy and gateway use a quarter less CPU time for a request.
"""

from __future__ import annotations

import asyncio
import ctypes
from collections import Counter
from typing import Any

from starlette.types import Message, Receive, Scope

from deploy.http.errors import ApiError, bad_request, overloaded
from deploy.settings import BODY_WITHIN_S

MAX_BYTES = 256 << 20
"""Bytes of all requests that one proxy holds at once."""
SMALL_BYTES = 1 << 20
"""Bodies up to this size have a quarter of the bytes to themselves."""
PASSED_BYTES = 64 << 10
"""A body up to this size goes with its request. Ray puts larger arguments of calls into its object store."""
PASSED_BODY = "blip2.body"
"""The key of the ASGI scope under which it goes."""
MAX_COMMAS = 100_000
"""Of JSON. Every value but the first follows a comma, and while JSON is parsed, no other thread runs: 27 MB
of empty lists would stop the event loop for seconds."""
BODY_PAUSE_S = 10.0
"""Seconds between two pieces of a body."""
_M_MMAP_THRESHOLD = -3
"""glibc's number of the setting, from its `malloc.h`."""


def give_back_large_memory() -> None:
    """Have this process give the memory of each large body back to the system as soon as it is freed.

    By default, glibc does so only until it has freed such a block once. From then on it cuts blocks of up to
    32 MiB out of its heap, where bodies that grow side by side leave holes: 256 MiB of bodies took 900 MiB.
    Another C library than glibc goes on as before.
    """
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(_M_MMAP_THRESHOLD, SMALL_BYTES)


def take_passed_bodies() -> None:
    """Have the Serve replica of this process find bodies where the front of the proxy has put them.

    Serve has no setting for this (Ray 2.60). It also looks up the actor of the proxy for each request, which
    only a request whose body is asked for needs.
    """
    from ray.serve._private import replica
    from ray.serve._private.common import StreamingHTTPRequest

    class Received(replica.ASGIReceiveProxy):
        """ASGI `receive`. A body that was not passed, as behind a proxy without our front, is asked for."""

        def __init__(self, scope: Scope, *arguments: Any) -> None:
            super().__init__(scope, *arguments)
            self._passed: bytes | None = scope.pop(PASSED_BODY, None)

        async def fetch_until_disconnect(self) -> None:
            if self._passed is None:
                await super().fetch_until_disconnect()
            else:
                self.queue.put_nowait({"type": "http.request", "body": self._passed, "more_body": False})

    of_proxy = StreamingHTTPRequest.receive_asgi_messages.fget

    def ask_when_called(request: StreamingHTTPRequest) -> Any:
        return lambda metadata: of_proxy(request)(metadata)

    if replica.ASGIReceiveProxy.__name__ != Received.__name__:
        replica.ASGIReceiveProxy = Received
        StreamingHTTPRequest.receive_asgi_messages = property(ask_when_called)


class Uploads:
    """Counts the bytes of the bodies that are here, and what each client sends or is about to.

    Large bodies leave a quarter to small ones, and one client never has more than half. What it announces
    counts from the start: else its bodies begin side by side, none of them fits, and it sends all of them
    again.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._num_claimed_of: Counter[str] = Counter()
        self.num_complete = 0
        """Counted requests with a body that is here as a whole, and no answer yet."""

    def body_of(
        self,
        client: str,
        receive: Receive,
        declared_bytes: int = 0,
        *,
        is_counted: bool = True,
        is_json: bool = False,
    ) -> Body:
        """Watch the body that a client sends; `Body.release` gives its bytes back.

        Args:
            is_counted: whether its request is one of `num_complete`.
            is_json: whether gateways refuse it beyond `MAX_COMMAS`. Then it is refused here, where most of it
                has not come yet.
        """
        return Body(self, client, receive, declared_bytes, is_counted, is_json)

    def check(self, num_bytes: int, num_bytes_so_far: int = 0) -> None:
        """Raise ApiError 503 if further bytes of a body do not fit."""
        is_small = num_bytes_so_far + num_bytes <= SMALL_BYTES
        limit = self._max_bytes if is_small else self._max_bytes * 3 // 4
        if self._num_bytes + num_bytes > limit:
            raise overloaded("too many bytes of other requests are being received", BODY_PAUSE_S)

    def hold(self, num_bytes: int, num_bytes_so_far: int) -> None:
        """Count further bytes of a body; raises what `check` raises."""
        self.check(num_bytes, num_bytes_so_far)
        self._num_bytes += num_bytes

    def claim(self, client: str, num_bytes: int, num_bytes_so_far: int = 0) -> None:
        """Count further bytes that a client sends or has announced.

        Raises:
            ApiError: 413 the body alone has more bytes than one client may have, 429 its bodies together.
        """
        if num_bytes_so_far + num_bytes > self._max_bytes // 2:
            message = f"a body must have at most {self._max_bytes // 2} bytes"
            raise ApiError(413, "too_large", message)
        is_small = num_bytes_so_far + num_bytes <= SMALL_BYTES
        if not is_small and self._num_claimed_of[client] + num_bytes > self._max_bytes // 2:
            message = f"requests of one client may have at most {self._max_bytes // 2} bytes at once"
            raise ApiError(429, "too_many_bytes", message, retry_after_s=BODY_PAUSE_S)
        self._num_claimed_of[client] += num_bytes

    def release(self, client: str, num_held: int, num_claimed: int) -> None:
        self._num_bytes -= num_held
        self._num_claimed_of[client] -= num_claimed
        if not self._num_claimed_of[client]:
            del self._num_claimed_of[client]


class Body:
    """ASGI `receive` that returns the whole body; one that breaks a limit ends as if its client had left."""

    def __init__(
        self,
        uploads: Uploads,
        client: str,
        receive: Receive,
        declared_bytes: int,
        is_counted: bool,
        is_json: bool,
    ) -> None:
        self.refusal: ApiError | None = None
        """Why the body ended before its end."""
        self.is_complete = False
        """All of it is here."""
        self.has_left = False
        """The client has closed its connection, before or after its end."""
        self._uploads = uploads
        self._client = client
        self._receive = receive
        self._num_bytes = 0
        self._num_claimed = 0
        self._declared_bytes = declared_bytes
        self._is_counted = is_counted
        self._is_json = is_json
        self._num_commas = 0
        self._again: Message | None = None
        self._late_at_s = asyncio.get_running_loop().time() + BODY_WITHIN_S

    @property
    def is_small(self) -> bool:
        """Whether it is announced to have at most `PASSED_BYTES`."""
        return self._declared_bytes <= PASSED_BYTES

    def give_again(self, message: Message) -> None:
        """Have the next call return a message once more, for a gateway that asks for what was passed."""
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
            self._uploads.check(self._declared_bytes)
            async with asyncio.timeout_at(self._late_at_s):
                return await self._gather()
        except TimeoutError:
            self.refusal = ApiError(
                408,
                "body_late",
                f"the body must come within {BODY_WITHIN_S:g} s, with pauses of at most {BODY_PAUSE_S:g} s",
            )
        except ApiError as refusal:
            # Its traceback would keep the bytes until Python looks for circles.
            self.refusal = refusal.with_traceback(None)
        return {"type": "http.disconnect"}

    async def _gather(self) -> Message:
        """Return the whole body as one message, or that the client has left."""
        body = bytearray()
        while True:
            async with asyncio.timeout(BODY_PAUSE_S):
                message = await self._next()
            if message["type"] != "http.request":
                return message
            piece = message.get("body", b"")
            self._hold(len(piece))
            self._count_commas(piece)
            is_last = not message.get("more_body", False)
            if is_last:
                self.is_complete = True
                self._uploads.num_complete += self._is_counted
            if is_last and not body:
                return message
            body += piece
            if is_last:
                return {"type": "http.request", "body": bytes(body), "more_body": False}

    async def _next(self) -> Message:
        message = await self._receive()
        self.has_left = message["type"] == "http.disconnect"
        return message

    def _count_commas(self, piece: bytes) -> None:
        if self._is_json:
            self._num_commas += piece.count(b",")
            if self._num_commas > MAX_COMMAS:
                raise bad_request(f"body must have at most {MAX_COMMAS} commas")

    def _hold(self, num_bytes: int) -> None:
        if self._num_bytes + num_bytes > self._num_claimed:  # nothing was announced
            self._claim(num_bytes)
        self._uploads.hold(num_bytes, self._num_bytes)
        self._num_bytes += num_bytes

    def _claim(self, num_bytes: int) -> None:
        self._uploads.claim(self._client, num_bytes, self._num_claimed)
        self._num_claimed += num_bytes

    def release(self) -> None:
        self._uploads.release(self._client, self._num_bytes, self._num_claimed)
        self._num_bytes = self._num_claimed = 0
        self._uploads.num_complete -= self.is_complete and self._is_counted
