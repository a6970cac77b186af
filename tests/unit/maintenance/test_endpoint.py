"""The replies of an endpoint, or of a proxy before it, to `blip2 verify --url`."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pipeline.endpoint import client
from pipeline.endpoint.client import Endpoint, EndpointError

Answer = tuple[int, dict[str, str], bytes]
"""Status, headers and body."""


@contextmanager
def server(answers: list[Answer], keys: list[str | None] | None = None) -> Iterator[str]:
    """Serve the answers in order; `keys` collects the key of each request."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if keys is not None:
                keys.append(self.headers.get("Authorization"))
            status, headers, body = answers.pop(0)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.server_port}"
        finally:
            listening.shutdown()
            thread.join()


def test_an_answer_that_is_cut_off_is_no_answer() -> None:
    cut = (200, {"Content-Length": "100"}, b'{"model":')
    with server([cut]) as url, pytest.raises(EndpointError, match="gives no answer"):
        Endpoint(url).model()


def test_a_busy_proxy_may_write_a_date(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(client.time, "sleep", pauses.append)
    busy = {"Retry-After": "Thu, 01 Jan 2026 00:00:00 GMT"}
    with server([(503, busy, b""), (429, {"Retry-After": "2"}, b""), (200, {}, b'{"model": "a"}')]) as url:
        assert Endpoint(url).model() == {"model": "a"}
    assert pauses == [1.0, 2.0]


@pytest.mark.parametrize("body", [b'{"error": "no upstream"}', b"<html>", b"[]", b""])
def test_a_refusal_of_a_proxy_is_told_by_its_status(body: bytes) -> None:
    with server([(502, {}, body)]) as url, pytest.raises(EndpointError, match=r"answers 502: Bad Gateway$"):
        Endpoint(url).model()
    with server([(302, {}, body)]) as url, pytest.raises(EndpointError, match=r"answers 302: Found$"):
        Endpoint(url).model()


def test_neither_request_nor_key_follows_to_another_address() -> None:
    """Batches of images used not to follow redirects, but the first request did."""
    first, second = list[str | None](), list[str | None]()
    with (
        server([(200, {}, b"{}")], second) as other,
        server([(302, {"Location": other}, b"")], first) as url,
        pytest.raises(EndpointError, match=f"{url} answers 302: a redirect to {other}, which is not"),
    ):
        Endpoint(url, "word").model()
    assert (first, second) == (["Bearer word"], [])


def test_no_proxy_is_between_a_job_and_its_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first request used to go through the environment's proxy, but batches of images did not."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with server([(200, {}, b'{"model": "a"}')]) as url:
        assert Endpoint(url).model() == {"model": "a"}


def test_a_path_in_front_of_the_routes_is_kept() -> None:
    assert Endpoint("https://web/captions/").target("/v1/batch") == "/captions/v1/batch"
