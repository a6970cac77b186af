"""An in-memory S3 server that answers late and counts its requests."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import pyarrow.fs as pafs
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server


class CountingStore:
    """Serve one bucket on loopback, in a thread of this process.

    Args:
        latency_s: seconds before each answer.
    """

    def __init__(self, latency_s: float) -> None:
        self._latency_s = latency_s
        self._app = DomainDispatcherApplication(create_backend_app)
        self._counts: Counter[str] = Counter()
        server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=_Silent)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self._options = f"endpoint_override=127.0.0.1:{server.server_port}&scheme=http&region=us-east-1"
        filesystem, _ = pafs.FileSystem.from_uri(self.uri("") + "&allow_bucket_creation=true")
        filesystem.create_dir("bucket")

    def uri(self, path: str) -> str:
        return f"s3://key:secret@bucket/{path}?{self._options}"

    def take_counts(self) -> dict[str, int]:
        """Return the number of requests of each kind since the last call.

        A kind is a method and its subject: a fragment, another file of a shard, or the run.
        """
        counts, self._counts = self._counts, Counter()
        return dict(sorted(counts.items()))

    def _answer(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        self._counts[_kind(environ["REQUEST_METHOD"], environ["PATH_INFO"], environ["QUERY_STRING"])] += 1
        time.sleep(self._latency_s)
        return self._app(environ, start)


def _kind(method: str, path: str, query: str) -> str:
    if "list-type" in query or query.startswith("delete"):
        method, path = ("LIST", query) if method == "GET" else ("DELETE many", "_blip2/fragments")
    if path.endswith(".arrow"):
        return f"{method} fragment"
    is_of_shard = "fragments" in path or path.endswith(".parquet")
    return f"{method} {'shard' if is_of_shard else 'run'}"


class _Silent(WSGIRequestHandler):
    def log(self, *arguments: Any, **options: Any) -> None:
        pass
