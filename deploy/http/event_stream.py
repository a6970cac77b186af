"""Answers that come in pieces: server-sent events, or one JSON document per line.

The work runs while the answer is sent, in one coroutine, so that everything it holds is released when the
client leaves. Nothing is sent before the first piece: an error until then is an ordinary answer with its own
code.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from deploy.http.errors import ApiError

EVENTS = "text/event-stream"
LINES = "application/x-ndjson"

logger = logging.getLogger("ray.serve")

Emit = Callable[[bytes], Awaitable[None]]


class EventStream(Response):
    """Sends what a coroutine emits."""

    def __init__(
        self,
        produce: Callable[[Emit], Awaitable[None]],
        encode_error: Callable[[ApiError], bytes],
        media_type: str = EVENTS,
    ) -> None:
        """
        Args:
            produce: does the work and emits encoded pieces.
            encode_error: makes the last piece of a stream that fails after its first piece.
        """
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(media_type=media_type, headers=headers)
        del self.headers["content-length"]
        self._produce = produce
        self._encode_error = encode_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_started = False

        async def emit(piece: bytes) -> None:
            nonlocal is_started
            if not is_started:
                is_started = True
                start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
                await send(start)
            await send({"type": "http.response.body", "body": piece, "more_body": True})

        try:
            await self._produce(emit)
        except ApiError as error:
            if not is_started:
                raise
            await emit(self._encode_error(error))
        except Exception:
            if not is_started:
                raise
            logger.exception("a stream has failed after its first piece")
            await emit(self._encode_error(ApiError(500, "internal", "the service failed on this request")))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def event(data: Any, name: str | None = None) -> bytes:
    """Encode one server-sent event whose data is JSON."""
    head = "" if name is None else f"event: {name}\n"
    return f"{head}data: {compact(data)}\n\n".encode()


def line(data: Any) -> bytes:
    """Encode one JSON document as a line."""
    return f"{compact(data)}\n".encode()


def compact(data: Any) -> str:
    """Return JSON without line breaks; characters stay as they are."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
