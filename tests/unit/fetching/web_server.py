"""A web server on the loopback interface, with the answers that a test gives it."""

from __future__ import annotations

import socket
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = bytes | int | tuple[int, dict[str, str]]
"""A body, a status, or a status with headers."""


class ClosingServer(ThreadingHTTPServer):
    """Ends with its threads: it closes the connections that clients keep."""

    daemon_threads = False  # so that they are waited for

    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self._connections: list[socket.socket] = []

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.append(request)
        super().process_request(request, client_address)

    def server_close(self) -> None:
        for connection in self._connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        super().server_close()


@dataclass
class WebServer:
    """Answers each path with the next of its answers, and then with the last one again."""

    answers: dict[str, Sequence[Answer]]
    url: str = ""
    num_requests: Counter[str] = field(default_factory=Counter)
    most_at_once: int = 0
    gate: threading.Barrier | None = None
    """Each answer waits until so many requests are there, or for a short time."""

    def answer(self, path: str) -> Answer:
        answers = self.answers.get(path, [404])
        number = self.num_requests[path]
        self.num_requests[path] += 1
        return answers[min(number, len(answers) - 1)]


@contextmanager
def web_server(
    answers: dict[str, Sequence[Answer]], gate: threading.Barrier | None = None
) -> Iterator[WebServer]:
    """Serve until the end of the block."""
    site = WebServer(answers, gate=gate)
    lock, open_requests = threading.Lock(), 0

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            nonlocal open_requests
            with lock:
                open_requests += 1
                site.most_at_once = max(site.most_at_once, open_requests)
                answer = site.answer(self.path)
            if site.gate is not None:
                try:
                    site.gate.wait(0.2)
                except threading.BrokenBarrierError:
                    pass
            with lock:
                open_requests -= 1
            body = answer if isinstance(answer, bytes) else b""
            status, headers = answer if isinstance(answer, tuple) else (200, dict[str, str]())
            self.send_response(answer if isinstance(answer, int) else status)
            for name, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

    with ClosingServer(Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        site.url = f"http://127.0.0.1:{server.server_port}"
        yield site
        server.shutdown()
