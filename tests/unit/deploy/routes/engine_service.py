"""A service without a cluster, whose engine and decoding run in this process, for tests of the routes."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, ClassVar

import httpx
import numpy as np
from PIL import Image

from blip2_actor import (
    DecodedImage,
    EngineBuilder,
    FetchPolicy,
    GenerationOptions,
    MatchingConfig,
    Status,
    decode_image,
)
from blip2_actor.testing import FakeEngineConfig, fake_caption
from deploy.calls.remote_captioner import Models
from deploy.captioner import Captioner
from deploy.fetching import Fetching
from deploy.guard.cost import Cost
from deploy.http.api import create_api
from deploy.http.errors import ApiError, of_status
from deploy.http.images import ImageSource
from deploy.http.served_model import ServedModel
from deploy.readiness import Readiness
from deploy.service import Service
from deploy.settings import Settings

SIDE_PX = FakeEngineConfig().image_size_px


class Replicas:
    """Stands for all replicas; the tests of the running endpoint have real ones."""

    def __init__(self) -> None:
        self.calls: list[bool | str] = []

    async def set_draining(self, is_draining: bool) -> None:
        self.calls.append(is_draining)

    async def set_log_level(self, level: str) -> None:
        self.calls.append(level)

    async def stats(self) -> dict[str, list[dict[str, Any]]]:
        return {"gateways": [{"num_in_flight": 3}], "engines": [{"num_tokens": 5}]}


class EngineService(Service):
    """Decodes in this process, admits nearly everything, and records what was admitted."""

    open_ones: ClassVar[list[EngineService]] = []
    """FastAPI keeps references to some of the latest services, so none ends by itself."""

    def __init__(
        self,
        engine: EngineBuilder = FakeEngineConfig(model="demo"),
        options: GenerationOptions = GenerationOptions(max_new_tokens=7),
        matching: MatchingConfig | None = None,
        image_policy: FetchPolicy = FetchPolicy(hosts=(), max_bytes=20_000),
    ) -> None:
        self.captioner = Captioner(engine, options, matching)
        settings = Settings(options=options, cache_bytes=0)
        models = Models(self.captioner, {}, settings)  # type: ignore[arg-type]
        info = engine.info()
        models.first = ServedModel(
            name=info.model,
            is_first=True,
            info=info,
            options=options.resolve(info.generation_config),
            matching=None if matching is None else matching.info(),
        )
        self.replicas = Replicas()
        super().__init__(settings, models, Readiness("app", []), self.replicas)  # type: ignore[arg-type]
        self.image_policy = image_policy
        self._fetching = Fetching(image_policy)
        self.api = create_api(self)
        self.costs: list[Cost] = []
        self.num_in_flight = 0
        self.full: ApiError | None = None
        """Raised instead of admitting."""
        self.open_ones.append(self)

    def close(self) -> None:
        """End the threads and the processes."""
        captioners: list[Any] = [self.captioner, *self._models._others.values()]
        for captioner in captioners:
            captioner.__del__()
            captioner._threads.shutdown()
            captioner._threads_of_batches.shutdown()
        self._decoding.close()
        self._fetching.close()

    @asynccontextmanager
    async def serve(self, cost: Cost | None) -> AsyncIterator[None]:
        if self.full is not None:
            raise self.full
        if cost is not None:
            self.costs.append(cost)
        self.num_in_flight += 1
        try:
            async with super().serve(cost):
                yield
        finally:
            self.num_in_flight -= 1

    @asynccontextmanager
    async def admit_batch(self, cost: Cost) -> AsyncIterator[Callable[[], None]]:
        async with self.serve(cost):
            yield lambda: None

    async def _load(self, source: ImageSource) -> tuple[bytes, str]:
        assert self.num_in_flight, "a request must be admitted before an image is fetched for it"
        return await super()._load(source)

    async def decode(self, model: ServedModel, image: bytes) -> DecodedImage:
        assert self.num_in_flight, "a request must be admitted before it is served"
        decoded = await asyncio.to_thread(decode_image, image, model.info.image_size_px)
        if decoded.status is not Status.OK:
            raise of_status(decoded.status, decoded.error)
        return decoded

    async def check_ready(self) -> None:
        if self.full is not None:
            raise self.full


def png(seed: int = 0, side_px: int = SIDE_PX) -> bytes:
    """Return a picture of the fake engine's own size, which resizing does not change."""
    pixels = np.random.default_rng(seed).integers(0, 255, (side_px, side_px, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def pixels_of(image: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(image)))


def caption_of(image: bytes, prompt: str | None = None) -> str:
    return fake_caption(pixels_of(image), prompt)


def base64_of(image: bytes) -> str:
    return base64.b64encode(image).decode()


def data_uri(image: bytes) -> str:
    return f"data:image/png;base64,{base64_of(image)}"


def ask(service: EngineService, method: str, path: str, **request: Any) -> httpx.Response:
    """Send one request to the routes, without a network."""

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(service.api, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **request)

    return asyncio.run(send())


def post(service: EngineService, path: str, **fields: Any) -> httpx.Response:
    return ask(service, "POST", path, json=fields)


def error_of(response: httpx.Response) -> tuple[int, str, str]:
    error = response.json()["error"]
    assert set(error) == {"type", "message", "param", "code"} and error["code"] == error["type"]
    return response.status_code, error["type"], error["message"]


def events_of(response: httpx.Response) -> list[tuple[str, Any]]:
    """Return the server-sent events of an answer: their names, and their data as JSON if it is."""
    assert response.headers["content-type"].startswith("text/event-stream")
    found = []
    for block in response.text.removesuffix("\n\n").split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        data = fields["data"]
        found.append((fields.get("event", "message"), json.loads(data) if data != "[DONE]" else data))
    return found
