"""The replica that callers reach: HTTP, admission and image decoding on CPU.

The rule: untrusted bytes end here. They are decoded in child processes with limits, and only pixels go on
to a `Captioner`. `Gateway` is a plain class; `deploy.app` makes the ingress deployment of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager

from fastapi import FastAPI
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from blip2_actor import DecodedImage, DecodePool, Embedding, GenerationOptions, ModelInfo, Status
from deploy.guard.cost import Cost
from deploy.http.api import create_api
from deploy.http.errors import RETRY_AFTER_S, ApiError, of_status
from deploy.remote_captioner import RemoteCaptioner
from deploy.settings import Settings
from deploy.work import ImageOutputs, ImageWork, TextPiece

READY_WITHIN_S = 2.0


class Gateway:
    """Admits, reads and decodes requests, and hands uint8[S, S, 3] to the engine's replicas."""

    model: ModelInfo

    async def __init__(self, captioner: DeploymentHandle, settings: Settings) -> None:  # type: ignore[misc]
        self.options: GenerationOptions = settings.options
        self.max_image_bytes = settings.image.max_file_bytes
        self._timeout_s = settings.timeout_s
        self._max_in_flight = settings.max_in_flight
        self._num_in_flight = 0
        self._captioner = RemoteCaptioner(captioner)
        # Only the captioner knows what "auto" means on its device; this also waits for the weights.
        self.model = await self._captioner.info()
        self.matching: ModelInfo | None = None if settings.matching is None else settings.matching.info()
        self._decoder = DecodePool(self.model.image_size_px, settings.image, settings.decode_children)
        self._decoder.decode([b"-"] * settings.decode_children)  # starts the children
        self._decode_threads = ThreadPoolExecutor(settings.decode_children, "decode")

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_api(self)

    @asynccontextmanager
    async def admit(self, cost: Cost) -> AsyncIterator[None]:
        if self._num_in_flight >= self._max_in_flight:
            message = f"{self._num_in_flight} requests are being served; try again in {RETRY_AFTER_S} s"
            raise ApiError(503, "overloaded", message)
        self._num_in_flight += 1
        try:
            async with asyncio.timeout(self._timeout_s):
                yield
        except TimeoutError:
            message = f"no answer within {self._timeout_s:g} s; try again, or request fewer tokens"
            raise ApiError(504, "timeout", message) from None
        finally:
            self._num_in_flight -= 1

    async def decode(self, image: bytes) -> DecodedImage:
        loop = asyncio.get_running_loop()
        [decoded] = await loop.run_in_executor(self._decode_threads, self._decoder.decode, [image])
        if decoded.status is not Status.OK:
            raise of_status(decoded.status, decoded.error)
        return decoded

    async def run(self, image: DecodedImage, work: ImageWork) -> ImageOutputs:
        outputs = await self._captioner.run(image.array(self.model.image_size_px), work)
        if outputs.failure is not None:
            raise of_status(*outputs.failure)
        return outputs

    async def stream(
        self, image: DecodedImage, work: ImageWork
    ) -> AsyncGenerator[TextPiece | ImageOutputs, None]:
        async with aclosing(self._captioner.stream(image.array(self.model.image_size_px), work)) as items:
            async for item in items:
                if isinstance(item, ImageOutputs) and item.failure is not None:
                    raise of_status(*item.failure)
                yield item

    async def embed_texts(self, texts: Sequence[str]) -> list[Embedding]:
        embeddings = await self._captioner.embed_texts(texts)
        for embedding in embeddings:
            if embedding.status is not Status.OK:
                raise of_status(embedding.status, embedding.error)
        return embeddings

    async def check_ready(self) -> None:
        try:
            async with asyncio.timeout(READY_WITHIN_S):
                await self._captioner.info()
        except (TimeoutError, BackPressureError, DeploymentUnavailableError, RayActorError):
            raise ApiError(503, "not_ready", "no engine answers; one may be starting") from None

    def __del__(self) -> None:
        if hasattr(self, "_decode_threads"):
            self._decode_threads.shutdown(wait=False, cancel_futures=True)
            self._decoder.close()
