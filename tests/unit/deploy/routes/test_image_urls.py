"""Images that requests name by URL: only from allowed hosts, on every route, never on the event loop."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from blip2_actor import FetchPolicy
from deploy.fetching import Fetching
from deploy.http.errors import ApiError
from deploy.http.images import ImageUrl
from deploy.settings import Settings
from tests.unit.deploy.routes.engine_service import (
    EngineService,
    base64_of,
    caption_of,
    error_of,
    events_of,
    png,
    post,
)

IMAGE = png(1)
LOOPBACK = FetchPolicy(
    hosts=("127.0.0.1", "127.0.0.2"), allow_networks=("127.0.0.1/32",), max_bytes=20_000, timeout_s=10.0
)
PRIVATE = [
    "http://169.254.169.254/latest/meta-data",
    "http://127.0.0.2/",
    "http://localhost/",
    "ftp://127.0.0.1/",
]


@contextmanager
def image_server(may_answer: threading.Event | None = None) -> Iterator[tuple[str, list[str]]]:
    """Serve `/image`, `/large` and `/to/URL`, a redirect; yield the address and the requested paths."""
    paths: list[str] = []

    class Images(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            if may_answer is not None:
                may_answer.wait(10)
            bodies = {"/image": IMAGE, "/large": bytes(20_001), "/text": b"no image"}
            if self.path.startswith("/to/"):
                self.send_response(302)
                self.send_header("Location", self.path.removeprefix("/to/"))
                self.end_headers()
            else:
                self.send_response(200 if self.path in bodies else 404)
                self.end_headers()
                self.wfile.write(bodies.get(self.path, b""))

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Images) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", paths
        finally:
            server.shutdown()
            thread.join(10)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with image_server() as (address, _):
        yield address


@pytest.fixture(scope="module")
def service() -> EngineService:
    return EngineService(image_policy=LOOPBACK)


def chat(service: EngineService, url: str, **fields: Any) -> httpx.Response:
    content = [{"type": "image_url", "image_url": {"url": url}}]
    messages = [{"role": "user", "content": content}]
    return post(service, "/v1/chat/completions", model="demo", messages=messages, **fields)


def test_every_route_fetches_the_image(service: EngineService, server: str) -> None:
    url, given = f"{server}/image", base64_of(IMAGE)
    for path, fields in (
        ("/v1/caption", {}),
        ("/v1/embed", {}),
        ("/v1/score", {"texts": ["a dog"]}),
    ):
        expected = post(service, path, image=given, **fields)
        assert expected.status_code == 200
        assert post(service, path, image=url, **fields).json() == expected.json()
    assert post(service, "/", inputs=url).json() == [{"generated_text": caption_of(IMAGE)}]
    [line] = post(service, "/v1/captions", images=[f"{server}/to/{url}"]).text.splitlines()
    assert json.loads(line)["caption"] == caption_of(IMAGE)
    *_, (name, answer) = events_of(post(service, "/v1/caption", image=url, stream=True))
    assert (name, answer["caption"]) == ("answer", caption_of(IMAGE))
    reranked = post(service, "/v1/rerank", query={"image": url}, documents=["a dog"])
    assert reranked.json()["results"]
    assert chat(service, url).json()["choices"][0]["message"]["content"] == caption_of(IMAGE)
    assert events_of(chat(service, url, stream=True))[-1] == ("message", "[DONE]")
    embedded = post(service, "/v1/embeddings", model="demo", input=[url, f"data:;base64,{given}"]).json()
    assert embedded["data"][0]["embedding"] == embedded["data"][1]["embedding"]
    assert service.num_in_flight == 0


@pytest.mark.parametrize("url", PRIVATE)
def test_a_redirect_to_a_private_address_is_refused(service: EngineService, server: str, url: str) -> None:
    for asked in (url, f"{server}/to/{url}"):
        code, kind, message = error_of(post(service, "/v1/caption", image=asked))
        assert (code, kind) == (400, "url_refused") and message.startswith("image: ")
        assert error_of(chat(service, asked))[:2] == (400, "url_refused")
        assert error_of(post(service, "/v1/embeddings", model="demo", input=asked))[0] == 400
        [line] = post(service, "/v1/captions", images=[asked]).text.splitlines()
        assert json.loads(line)["status"] == "url_refused"


@pytest.mark.parametrize(
    ("path", "code", "kind"),
    [
        ("/none", 422, "url_unreadable"),
        ("/large", 413, "too_large"),
        ("/text", 422, "undecodable"),
        ("/to/http://[", 400, "url_refused"),
        ("/to//to//to//to//to//to//to/", 422, "url_unreadable"),
    ],
)
def test_what_cannot_be_fetched_has_a_code(
    service: EngineService, server: str, path: str, code: int, kind: str
) -> None:
    assert error_of(post(service, "/v1/caption", image=server + path))[:2] == (code, kind)


def test_nothing_is_fetched_by_default_or_for_a_request_that_is_not_admitted() -> None:
    usual = EngineService()
    full = EngineService(image_policy=LOOPBACK)
    full.full = ApiError(503, "overloaded", "full")
    with image_server() as (address, paths):
        url = f"{address}/image"
        for path, fields in (
            ("/v1/caption", {"image": url}),
            ("/v1/embeddings", {"model": "demo", "input": url}),
        ):
            assert error_of(post(usual, path, **fields))[:2] == (400, "url_refused")
        assert error_of(chat(usual, url))[:2] == (400, "url_refused")
        assert post(usual, "/v1/captions", images=[url]).json()["status"] == "url_refused"
        assert error_of(post(full, "/v1/caption", image=url))[0] == 503
        assert not paths


def test_a_slow_host_leaves_the_event_loop_free_and_keeps_its_thread() -> None:
    may_answer = threading.Event()

    async def run(address: str) -> None:
        fetching = Fetching(LOOPBACK, num_threads=1)
        image = ImageUrl(field="image", url=f"{address}/image")
        left = asyncio.create_task(fetching.fetch(image))
        second = asyncio.create_task(fetching.fetch(image))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        left.cancel()  # its caller has left, but the thread still waits for the host
        await asyncio.wait([left])
        assert fetching._gate._waiting and not second.done()
        may_answer.set()
        assert await second == IMAGE
        fetching.close()

    with image_server(may_answer) as (address, _):
        asyncio.run(run(address))


def test_settings_name_hosts_and_bound_what_is_fetched() -> None:
    policy = Settings(allow_image_host=("Images.Example.com",), timeout_s=5.0).image_policy
    assert (policy.hosts, policy.timeout_s) == (("images.example.com",), 5.0)
    assert policy.max_bytes == Settings().image.max_file_bytes
    assert Settings().image_policy.hosts == () and not policy.allow_networks
    for host in ("https://example.com", "example.com:80", "*.example.com", "example.com/a", ""):
        with pytest.raises(ValueError, match="allow_image_host"):
            Settings(allow_image_host=(host,))
