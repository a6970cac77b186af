"""The captioner as a gateway sees it: calls through Serve's handle, with a caller's departure passed on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import Any

import numpy as np
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from blip2_actor import Embedding, ModelInfo, Result
from deploy.http.errors import overloaded
from deploy.work import ImageOutputs, ImageWork, TextOfBatch, TextPiece


class RemoteCaptioner:
    """Calls one of the replicas of `Captioner`."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def info(self) -> ModelInfo:
        info: ModelInfo = await self._handle.info.remote()
        return info

    async def matching_info(self) -> ModelInfo | None:
        info: ModelInfo | None = await self._handle.matching_info.remote()
        return info

    async def run(self, pixels: np.ndarray, work: ImageWork) -> ImageOutputs:
        """As `Captioner.run`.

        Raises:
            ApiError: 503; no engine can take the request.
        """
        outputs: ImageOutputs = await _answer(self._handle.run.remote(pixels, work))
        return outputs

    async def embed_texts(self, texts: Sequence[str]) -> list[Embedding]:
        """As `Captioner.embed_texts`; raises what `run` raises."""
        embeddings: list[Embedding] = await _answer(self._handle.embed_texts.remote(texts))
        return embeddings

    async def stream(
        self, pixels: np.ndarray, work: ImageWork
    ) -> AsyncGenerator[TextPiece | ImageOutputs, None]:
        """As `Captioner.stream`; raises what `run` raises, at the start or later."""
        async with aclosing(self._items("stream", pixels, work)) as items:
            async for item in items:
                yield item

    async def run_batch(
        self, images: np.ndarray, texts: Sequence[TextOfBatch]
    ) -> AsyncGenerator[list[tuple[int, Result]], None]:
        """As `Captioner.run_batch`; raises what `run` raises, at the start or later."""
        async with aclosing(self._items("run_batch", images, texts)) as items:
            async for item in items:
                yield item

    async def _items(self, method: str, *arguments: Any) -> AsyncGenerator[Any, None]:
        """Yield what a method of the captioner yields; if that ends early, free the slots of the engine."""
        response = self._handle.options(method_name=method, stream=True).remote(*arguments)
        is_complete = False
        try:
            with _no_engine_is_503():
                async for item in response:
                    yield item
            is_complete = True
        finally:
            if not is_complete:
                response.cancel()


async def _answer(response: Any) -> Any:
    """Wait for Serve's response; if the wait is cancelled, free the slots of the engine."""
    try:
        with _no_engine_is_503():
            return await response
    except asyncio.CancelledError:
        response.cancel()
        raise


@contextmanager
def _no_engine_is_503() -> Iterator[None]:
    try:
        yield
    except (BackPressureError, DeploymentUnavailableError, RayActorError):
        raise overloaded("no engine can take the request now") from None
