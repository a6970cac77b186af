"""The record of the request that is being served: who asked, what it cost, and where its time went.

`AccessLog` begins a record and logs it at the end. The code that serves the request writes into it through
the context. A record never holds a key, an image or a prompt.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from ray.util.metrics import Histogram
from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deploy.observe.metrics import HTTP_SECONDS
from deploy.observe.tracing import span

logger = logging.getLogger("ray.serve")

CLIENT_LEFT = 499
"""nginx's code for a request whose client left before the answer, in the log and the metrics."""


@dataclass
class RequestRecord:
    """One request."""

    request_id: str = ""
    """The client's X-Request-ID, or the one that the front has made."""
    key: str | None = None
    """Name of the caller's key."""
    model: str | None = None
    """Name of the model that the request chose, or got by default."""
    is_in_ab_test: bool = False
    """Whether the A/B test has chosen the model."""
    slots: int = 0
    steps: int = 0
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Seconds by phase (queue, decode, engine), summed over several images."""

    @property
    def server_timing(self) -> str:
        """The value of the header Server-Timing, in milliseconds."""
        return ", ".join(f"{phase};dur={1000 * seconds:.1f}" for phase, seconds in self.seconds.items())


OF_NO_REQUEST = RequestRecord()
"""Takes what is noted outside of a request; never logged, and in no A/B test."""
RECORD: ContextVar[RequestRecord] = ContextVar("RECORD", default=OF_NO_REQUEST)


@contextmanager
def timed(phase: str, histogram: Histogram | None = None) -> Iterator[None]:
    """Add the time of a block to a phase of the request that is being served, a metric and its trace."""
    began_s = time.perf_counter()
    try:
        with span(phase):
            yield
    finally:
        seconds = time.perf_counter() - began_s
        if histogram is not None:
            histogram.observe(seconds)
        RECORD.get().seconds[phase] += seconds


class AccessLog:
    """ASGI middleware that logs each request in one line, with `Server-Timing` in its answer.

    The line is a log record with fields of its own; Serve's JSON encoding writes them as JSON, next to the
    request id. Probes are logged at the level DEBUG.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        record, code, began_s = RequestRecord(request_id), CLIENT_LEFT, time.perf_counter()
        RECORD.set(record)

        async def send_with_timing(message: Message) -> None:
            nonlocal code
            if message["type"] == "http.response.start":
                code = message["status"]
                record.seconds["total"] = time.perf_counter() - began_s
                MutableHeaders(scope=message)["Server-Timing"] = record.server_timing
            await send(message)

        try:
            await self._app(scope, receive, send_with_timing)
        except Exception as error:
            if code == CLIENT_LEFT and not isinstance(error, ClientDisconnect):
                code = 500  # Starlette sends it, outside of this middleware
            raise
        finally:
            record.seconds["total"] = time.perf_counter() - began_s
            self._finish(scope, record, code)

    def _finish(self, scope: Scope, record: RequestRecord, code: int) -> None:
        route = getattr(scope.get("route"), "path", "other")
        HTTP_SECONDS.observe(record.seconds["total"], {"route": route, "code": str(code)})
        is_work = scope["method"] == "POST"
        fields = {
            "method": scope["method"],
            "http_route": route,
            "code": code,
            "key": record.key,
            "model": record.model,
            "slots": record.slots,
            "steps": record.steps,
            **{f"{phase}_ms": round(1000 * seconds, 1) for phase, seconds in record.seconds.items()},
        }
        logger.log(logging.INFO if is_work else logging.DEBUG, "request", extra=fields)
