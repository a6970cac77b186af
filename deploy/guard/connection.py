"""A connection of the server inside Serve's proxy, with the limits that uvicorn has no settings for.

uvicorn waits without limit for the end of a header section, and keeps all of it. Serve creates the server
itself and passes no limits on, so `install` enters this class in uvicorn's table of protocols.
"""

from __future__ import annotations

import asyncio
from typing import Any

import httptools
from uvicorn.config import HTTP_PROTOCOLS
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from deploy.http.errors import ApiError

HEADERS_WITHIN_S = 10.0
"""Seconds from the first byte of a request, or from the connection, to the end of its headers."""
MESSAGE_WITHIN_S = 90.0
"""Seconds until the whole request must be there; a body may take less, so that a late one is answered."""
MAX_HEADER_BYTES = 32 << 10
MAX_HEADERS = 100
CLOSE_WITHIN_S = 30.0
"""Seconds from an answer that ends the connection to the close, while the client still sends."""
DISCARDED_AT_ONCE = 256 << 10
DISCARD_PAUSE_S = 0.05
"""After an answer before the end of the body, this many bytes are read between two pauses: 5 MiB/s. Most
clients read an answer only when they have sent everything. At full speed, two clients whose uploads are
refused again and again would send 150 MiB/s."""


def install() -> None:
    """Have every server that this process starts from now on use `GuardedConnection`."""
    HTTP_PROTOCOLS["auto"] = f"{__name__}:{GuardedConnection.__name__}"


class GuardedConnection(HttpToolsProtocol):
    """HTTP/1.1 with limits on headers, and no other protocol; a request that breaks a limit is answered."""

    _timer: asyncio.TimerHandle | None = None
    _overhead_bytes = 0
    """Bytes of headers, chunk sizes and trailers since the last byte of a body, without bytes that follow the
    headers in the same piece."""
    _has_headers = False
    _cycle_before: RequestResponseCycle
    """The cycle before `cycle`; None before the second request."""
    _served: RequestResponseCycle | None = None
    """The cycle whose request is being served; `cycle` is that of the last request, which may wait for it."""
    _is_last = False
    """Nothing more is read; the connection ends after the answers that are under way."""
    _num_discarded = 0
    """Discarded bytes since the last pause."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)
        if self._served is not None and not self._served.response_complete:
            self._served.disconnected = True
            self._served.message_event.set()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._served = cycle
        super()._start_asgi_task(cycle, app)

    @property
    def is_receiving(self) -> bool:
        """Whether the client is in the middle of a body, or has sent something that is not a request."""
        return self._is_last or self._has_headers

    @property
    def _is_ending(self) -> bool:
        return self._is_last or self.transport.is_closing()

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        if self._is_last:
            self._discard(len(data))
            return
        self._overhead_bytes += len(data)
        # Line breaks before a request do not begin a message, so the timer starts here.
        if not self._has_headers and self._timer is None:
            self._expect_headers()
        self._parse(data)
        # Bytes of a body may have come in the same piece; then the headers are over.
        if not self._is_last and self._overhead_bytes > MAX_HEADER_BYTES:
            self._refuse_headers()

    def _parse(self, data: bytes) -> None:
        left = memoryview(data)
        try:
            while left and not self._is_ending:
                try:
                    self.parser.feed_data(left)
                    return
                except httptools.HttpParserUpgrade as upgrade:
                    left = left[upgrade.args[0] :]
                    self._parse_without_upgrade()
        except httptools.HttpParserError as error:
            self.send_400_response(str(error))

    def _parse_without_upgrade(self) -> None:
        """Parse the headers of an upgrade request again, as those of a plain request.

        Otherwise the parser takes everything after such headers, even a body, for another protocol.
        """
        method, version = self.parser.get_method(), self.parser.get_http_version().encode()
        if self._is_ending:
            return
        lines = [b"%s: %s\r\n" % header for header in self.headers if header[0] != b"upgrade"]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
        self.parser.feed_data(b"%s %s HTTP/%s\r\n%s\r\n" % (method, self.url, version, b"".join(lines)))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._expect_headers()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._has_headers:  # a trailer; uvicorn would add it to the headers, which have been checked
            return
        super().on_header(name, value)
        if len(self.headers) > MAX_HEADERS:
            self._refuse_headers()

    def on_headers_complete(self) -> None:
        if self._is_ending:
            return
        if self.parser.get_method() == b"CONNECT":
            self._refuse(400, "bad_http", "CONNECT asks for a proxy, and this is none")
            return
        if self.parser.should_upgrade():  # then these headers are parsed again
            return
        if sum(len(name) + len(value) for name, value in self.headers) > MAX_HEADER_BYTES:
            self._refuse_headers()
            return
        if self.parser.get_http_version() == "1.1" and not any(name == b"host" for name, _ in self.headers):
            self._refuse(400, "bad_http", "an HTTP/1.1 request must have the header Host")
            return
        self._cycle_before = self.cycle
        super().on_headers_complete()
        self.cycle.transport = _AnswerTransport(self)  # type: ignore[assignment]
        self._has_headers = True
        self._overhead_bytes = 0
        self._start_timer(MESSAGE_WITHIN_S, self.transport.close)
        if self.scope["http_version"] == "1.0":
            _answer_without_chunks(self.cycle)

    def on_body(self, body: bytes) -> None:
        self._overhead_bytes = 0
        if self._is_ending:
            return
        super().on_body(body)
        if self.cycle.response_complete:
            self._discard(len(body))

    def _discard(self, num_bytes: int) -> None:
        """Pause after enough bytes of a body whose request is already answered."""
        self._num_discarded += num_bytes
        if self._num_discarded >= DISCARDED_AT_ONCE:
            self._num_discarded = 0
            self.flow.pause_reading()
            self.loop.call_later(DISCARD_PAUSE_S, self._read_on)

    def _read_on(self) -> None:
        if not self.transport.is_closing():
            self.flow.resume_reading()

    def on_message_complete(self) -> None:
        self._stop_timer()
        self._overhead_bytes = 0
        if self._is_ending or not self._has_headers:
            return
        self._has_headers = False
        super().on_message_complete()
        if self.cycle.response_complete:  # answered before its end, so that uvicorn no longer waits for it
            self._start_timer(HEADERS_WITHIN_S, self.transport.close)

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "bad_http", "the bytes must be an HTTP/1.1 request")

    def _should_upgrade(self) -> bool:
        return False  # no WebSocket

    def _expect_headers(self) -> None:
        late = f"the headers must be complete within {HEADERS_WITHIN_S:g} s"
        self._start_timer(HEADERS_WITHIN_S, self._refuse, 408, "headers_late", late)

    def _refuse_headers(self) -> None:
        message = f"headers must be at most {MAX_HEADERS} of together {MAX_HEADER_BYTES} bytes"
        self._refuse(431, "headers_too_large", message)

    def _refuse(self, code: int, type: str, message: str) -> None:
        if self._is_ending:
            return
        if self._has_headers and self.cycle.response_complete:  # this request has its answer
            self.end(is_sending=True)
            return
        if self._has_headers and self.pipeline:  # this request never gets its turn
            self.pipeline.popleft()
            self.cycle = self._cycle_before
        if self.cycle is not None and not self.cycle.response_complete:
            if not self.cycle.more_body:  # an answer here would be taken for that of the previous request
                self._stop_timer()
                self._is_last = True
                self.cycle.keep_alive = False
                return
            if self.cycle.response_started:
                self.transport.close()
                return
            self.cycle.disconnected = True
            self.cycle.waiting_for_100_continue = False
            self.cycle.message_event.set()
        body = bytes(ApiError(code, type, message).response().body)
        head = f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        self.transport.write(STATUS_LINE[code] + head.encode() + body)
        self.end(is_sending=code != 408)

    def end(self, *, is_sending: bool) -> None:
        """Close the connection; while the client sends, close only its other direction.

        If bytes are left unread, the system sends a reset, which may overtake the answer, so that the client,
        or a proxy in front, never gets it.
        """
        if not is_sending or not self.transport.can_write_eof():
            self.transport.close()
        elif not self.transport.is_closing():
            self._is_last = True
            self.pipeline.clear()
            self.transport.write_eof()
            self.flow.resume_reading()
            self._start_timer(CLOSE_WITHIN_S, self.transport.close)

    def _start_timer(self, seconds: float, end: Any, *arguments: Any) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(seconds, end, *arguments)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class _AnswerTransport:
    """Where a request writes its answer; it ends the connection so that the answer arrives."""

    def __init__(self, connection: GuardedConnection) -> None:
        self._connection = connection
        self.write = connection.transport.write
        self.is_closing = connection.transport.is_closing

    def close(self) -> None:
        connection = self._connection
        connection.end(is_sending=connection.is_receiving)


def _answer_without_chunks(cycle: RequestResponseCycle) -> None:
    """End an answer without a length by closing the connection: HTTP/1.0 has no chunks."""
    send = cycle.send
    has_length = False

    async def send_plain(message: Any) -> None:
        nonlocal has_length
        if message["type"] == "http.response.start":
            has_length = any(name.lower() == b"content-length" for name, _ in message["headers"])
            cycle.chunked_encoding = None if has_length else False
        elif not has_length:
            cycle.expected_content_length = len(message.get("body", b""))
        await send(message)

    cycle.send = send_plain  # type: ignore[method-assign]
