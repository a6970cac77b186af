"""No log line contains what callers send: images, prompts and keys, whatever happens to the request."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from pathlib import Path
from typing import Any

import httpx
import pytest

from deploy.guard.access import Access
from deploy.guard.front import Front
from deploy.guard.keys import KeyFile
from deploy.http.errors import unavailable
from tests.unit.deploy.routes.engine_service import EngineService, base64_of, data_uri, png

KEY = "key-of-alice-3e9b"
PROMPT = "prompt-marker-7f3a"
IMAGE = png(1) + b"image-marker-51c2" * 3
DAMAGED = b"image-marker-51c2" * 3
SECRETS = (
    "alice-3e9b",
    "marker-7f3a",
    "marker-51c2",
    *(base64_of(IMAGE)[at : at + 20] for at in (0, 60, 120)),
)
MESSAGES = [
    {
        "role": "user",
        "content": [
            {"type": "text", "text": PROMPT},
            {"type": "image_url", "image_url": {"url": data_uri(IMAGE)}},
        ],
    }
]
GIVEN = {"image": base64_of(IMAGE), "prompt": PROMPT}
REQUESTS: list[tuple[int, str, dict[str, Any]]] = [
    (200, "/v1/caption", {"json": GIVEN | {"ask": {"marker-7f3a": PROMPT}, "choices": [PROMPT]}}),
    (200, "/v1/caption", {"json": GIVEN | {"stream": True}}),
    (200, "/v1/caption", {"files": {"image": (PROMPT, IMAGE)}, "data": {"prompt": PROMPT}}),
    (200, "/v1/caption", {"content": IMAGE, "params": {"prompt": PROMPT}}),
    (200, "/v1/captions", {"json": {"images": [base64_of(IMAGE), base64_of(DAMAGED)], "prompt": PROMPT}}),
    (200, "/v1/score", {"json": GIVEN | {"texts": [PROMPT]}}),
    (200, "/v1/rerank", {"json": {"query": data_uri(IMAGE), "documents": [PROMPT]}}),
    (200, "/v1/embed", {"json": {"image": base64_of(IMAGE)}}),
    (200, "/v1/chat/completions", {"json": {"model": "demo", "messages": MESSAGES}}),
    (200, "/v1/chat/completions", {"json": {"model": "demo", "messages": MESSAGES, "stream": True}}),
    (200, "/v1/embeddings", {"json": {"model": "demo", "input": data_uri(IMAGE)}}),
    (200, "/", {"json": {"inputs": base64_of(IMAGE)}}),
    (400, "/v1/match", {"json": {"image": base64_of(IMAGE), "texts": [PROMPT]}}),
    (400, "/v1/caption", {"json": GIVEN | {"options": {PROMPT: PROMPT}}}),
    (400, "/v1/caption", {"json": GIVEN | {"prompt": [PROMPT]}}),
    (400, "/v1/caption", {"json": {"image": f"http://127.0.0.1/{PROMPT}"}}),
    (400, "/v1/caption", {"content": PROMPT, "headers": {"content-type": "application/json"}}),
    (413, "/v1/caption", {"content": DAMAGED * 1000}),
    (415, "/v1/caption", {"content": PROMPT, "headers": {"content-type": "text/marker-7f3a"}}),
    (422, "/v1/caption", {"content": DAMAGED, "params": {"prompt": PROMPT}}),
    (404, f"/{PROMPT}", {}),
]


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """Yield every line of every logger, except those of this test's client."""
    caplog.set_level(logging.WARNING, "httpx")
    caplog.set_level(logging.DEBUG, "ray.serve")
    caplog.set_level(logging.DEBUG)  # the last call sets the level of the handler too
    return caplog


class Endpoint:
    """The front, the keys and the routes, in the order of a request's path; the server logs exceptions."""

    def __init__(self, folder: Path) -> None:
        keys = folder / "keys.txt"
        keys.write_text(f"alice {hashlib.sha256(KEY.encode()).hexdigest()}\n")
        self.service = EngineService()
        self._app = Front(Access(self.service.api, keys=KeyFile(str(keys)), max_in_flight=9))

    def post(self, path: str, key: str = KEY, **request: Any) -> int:
        async def send() -> int:
            transport = httpx.ASGITransport(self._logging)
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
                headers = {"authorization": f"Bearer {key}"} | request.pop("headers", {})
                return (await client.post(path, headers=headers, **request)).status_code

        return asyncio.run(send())

    async def _logging(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await self._app(scope, receive, send)
        except Exception:
            logging.getLogger("uvicorn.error").exception("Exception in ASGI application")


def no_secret_in(logged: pytest.LogCaptureFixture) -> None:
    assert logged.records, "asyncio logs the selector of each loop"
    for record in logged.records:
        line = logging.Formatter().format(record) + repr(record.__dict__)
        assert not [secret for secret in SECRETS if secret in line], line


def test_no_request_is_logged_with_its_content(logged: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    endpoint = Endpoint(tmp_path)
    for code, path, request in REQUESTS:
        assert endpoint.post(path, **dict(request)) == code, (path, request.keys())
    assert endpoint.post("/v1/caption", key=f"{KEY}x", json=GIVEN) == 401
    no_secret_in(logged)


def test_no_failure_is_logged_with_its_request(
    logged: pytest.LogCaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = Endpoint(tmp_path)

    async def fail(*_: object) -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(endpoint.service, "run", fail)
    for path, request in (
        ("/v1/caption", {"json": GIVEN}),
        ("/v1/captions", {"json": {"images": [base64_of(IMAGE)], "prompt": PROMPT}}),
        ("/v1/chat/completions", {"json": {"model": "demo", "messages": MESSAGES}}),
    ):
        logged.clear()
        assert endpoint.post(path, **request) == 500
        assert "the device is gone" in logged.text
        no_secret_in(logged)


def test_a_service_that_starts_or_ends_logs_no_request(
    logged: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    endpoint = Endpoint(tmp_path)
    endpoint.service.full = unavailable("the service is ending")
    for code, path, request in REQUESTS:
        if code == 200 and path != "/v1/captions":  # whose lines tell the status of each image
            assert endpoint.post(path, **dict(request)) == 503, path
    no_secret_in(logged)
