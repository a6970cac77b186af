"""An S3 server (moto) in its own process that fails on request.

`python -m tests.chaos.stores.faulty_s3` prints its port. After `POST /faults?each=N&outage_at=KIND`
the first N requests of each kind (method and subject) get 503 SlowDown or, after being carried out, 500
InternalError. From the next request of the kind `outage_at` on, all requests fail for a while; the first of
them is answered only after the client has timed out. `GET /faults` counts the failures by kind.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import parse_qs, urlencode
from urllib.request import urlopen

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

OUTAGE_S = 7.0
"""Longer than Arrow's client retries (30 times, 0.2 s apart)."""
SLOW_S = 4.0
"""Longer than Arrow's client waits for an answer."""
SUBJECTS = ("/report.json", "_blip2/fragments", "_blip2/lease", "_blip2/probe", "_blip2/", ".parquet", ".tar")


class Faults:
    """WSGI middleware that makes requests fail."""

    def __init__(self, app: Callable) -> None:
        self._app = app
        self._lock = threading.Lock()
        self._each = 0
        self._seen: Counter[str] = Counter()
        self._outage_at, self._outage_ends = "", 0.0

    def __call__(self, environ: dict[str, Any], start: Callable) -> Any:
        if environ["PATH_INFO"] == "/faults":
            return self._control(environ, start)
        kind = kind_of(environ["REQUEST_METHOD"], environ["PATH_INFO"], environ["QUERY_STRING"])
        with self._lock:
            answer = self._next(kind)
        if answer is None:
            return self._app(environ, start)
        if answer == "slow":
            time.sleep(SLOW_S)
        if answer == "500 late":
            b"".join(self._app(environ, lambda *_: None))
        return _refuse(answer, start)

    def _next(self, kind: str) -> str | None:
        if self._seen[kind] < self._each:
            self._seen[kind] += 1
            return "503" if self._seen.total() % 2 else "500 late"
        if kind == self._outage_at:
            self._outage_at, self._outage_ends = "", time.monotonic() + OUTAGE_S
        if time.monotonic() < self._outage_ends:
            self._seen["outage"] += 1
            return "slow" if self._seen["outage"] == 1 else "503"
        return None

    def _control(self, environ: dict[str, Any], start: Callable) -> list[bytes]:
        with self._lock:
            if environ["REQUEST_METHOD"] == "POST":
                asked = parse_qs(environ["QUERY_STRING"])
                self._each = int(asked["each"][0])
                self._outage_at, self._outage_ends = asked.get("outage_at", [""])[0], 0.0
                self._seen.clear()
            start("200 OK", [("Content-Type", "application/json")])
            return [json.dumps(self._seen).encode()]


def kind_of(method: str, path: str, query: str) -> str:
    """Return the kind of a request, such as "PUT _blip2/fragments" or "LIST"."""
    if method == "GET" and "list-type" in query:
        return "LIST"
    return f"{method} {next((subject for subject in SUBJECTS if subject in path), 'other')}"


def _refuse(answer: str, start: Callable) -> list[bytes]:
    code, line = ("SlowDown", "503 Slow Down") if answer == "503" else ("InternalError", "500 Internal Error")
    start(line, [("Content-Type", "application/xml"), ("Connection", "close")])
    return [f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode()]


class FaultyStore:
    """The running server: URIs in it, and its counts of faults."""

    def __init__(self, port: int) -> None:
        self._control = f"http://127.0.0.1:{port}/faults"
        self.options = (
            f"?endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1&allow_bucket_creation=true"
        )

    def uri(self, path: str) -> str:
        return f"s3://key:secret@{path}{self.options}"

    def fail(self, each: int, outage_at: str = "") -> None:
        """Make the first `each` requests of each kind fail, then all for a while, starting with one kind."""
        urlopen(f"{self._control}?{urlencode({'each': each, 'outage_at': outage_at})}", data=b"").close()

    def failures(self) -> dict[str, int]:
        with urlopen(self._control) as answer:
            return json.load(answer)


@contextmanager
def faulty_store() -> Iterator[FaultyStore]:
    command = [sys.executable, "-m", "tests.chaos.stores.faulty_s3"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            yield FaultyStore(int(process.stdout.readline()))
        finally:
            process.kill()


if __name__ == "__main__":
    import logging

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    app = Faults(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, app, threaded=True)
    print(server.server_port, flush=True)
    server.serve_forever()
