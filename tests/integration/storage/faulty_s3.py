"""An S3 server, moto's, as a process of its own, that answers badly now and then.

`python -m tests.integration.storage.faulty_s3` prints its port. After `POST /faults?each=N&spell_at=KIND` the
first N requests of each kind (method, and what it is about) are answered with 503 SlowDown or, after they
were carried out, with 500 InternalError; and from the first healthy request of one kind on, all fail for a
while, the first of them only after the client has lost patience. `GET /faults` counts what was done by kind.
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

SPELL_S = 7.0
"""Longer than Arrow's client goes on trying: 30 times, 0.2 s apart."""
SLOW_S = 4.0
"""Longer than it waits for one answer."""
ABOUT = ("_blip2/fragments", "_blip2/ends", "_blip2/lease", "_blip2/probe", "_blip2/", ".parquet", ".tar")


class Faults:
    """WSGI middleware."""

    def __init__(self, app: Callable) -> None:
        self._app = app
        self._lock = threading.Lock()
        self._each = 0
        self._seen: Counter[str] = Counter()
        self._spell_at, self._spell_ends = "", 0.0

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
        if kind == self._spell_at:
            self._spell_at, self._spell_ends = "", time.monotonic() + SPELL_S
        if time.monotonic() < self._spell_ends:
            self._seen["spell"] += 1
            return "slow" if self._seen["spell"] == 1 else "503"
        return None

    def _control(self, environ: dict[str, Any], start: Callable) -> list[bytes]:
        with self._lock:
            if environ["REQUEST_METHOD"] == "POST":
                asked = parse_qs(environ["QUERY_STRING"])
                self._each = int(asked["each"][0])
                self._spell_at, self._spell_ends = asked.get("spell_at", [""])[0], 0.0
                self._seen.clear()
            start("200 OK", [("Content-Type", "application/json")])
            return [json.dumps(self._seen).encode()]


def kind_of(method: str, path: str, query: str) -> str:
    """Such as "PUT _blip2/fragments" or "LIST"."""
    if method == "GET" and "list-type" in query:
        return "LIST"
    return f"{method} {next((about for about in ABOUT if about in path), 'other')}"


def _refuse(answer: str, start: Callable) -> list[bytes]:
    code, line = ("SlowDown", "503 Slow Down") if answer == "503" else ("InternalError", "500 Internal Error")
    start(line, [("Content-Type", "application/xml"), ("Connection", "close")])
    return [f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode()]


class FaultyStore:
    """The server as its tests see it."""

    def __init__(self, port: int) -> None:
        self._control = f"http://127.0.0.1:{port}/faults"
        self.options = (
            f"?endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1&allow_bucket_creation=true"
        )

    def uri(self, path: str) -> str:
        return f"s3://key:secret@{path}{self.options}"

    def fail(self, each: int, spell_at: str = "") -> None:
        """From now on the first requests of each kind go wrong, and from one kind on all for a while."""
        urlopen(f"{self._control}?{urlencode({'each': each, 'spell_at': spell_at})}", data=b"").close()

    def failures(self) -> dict[str, int]:
        with urlopen(self._control) as answer:
            return json.load(answer)


@contextmanager
def faulty_store() -> Iterator[FaultyStore]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.integration.storage.faulty_s3"], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        yield FaultyStore(int(process.stdout.readline()))
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    import logging

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    app = Faults(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, app, threaded=True)
    print(server.server_port, flush=True)
    server.serve_forever()
