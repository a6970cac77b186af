"""The replica that callers reach: HTTP, admission and image decoding on CPU.

The rule: untrusted bytes end here. They are decoded in child processes with limits, and only pixels go on
to a `Captioner`. `Gateway` is a plain class; `deploy.app` makes the ingress deployment of it.
"""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor

from fastapi import FastAPI
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from blip2_actor import DecodedImage, DecodePool, GenerationOptions, ModelInfo, Result, Status
from deploy.http.api import create_api
from deploy.http.errors import RETRY_AFTER_S, ApiError, of_status
from deploy.http.request_body import CaptionCall
from deploy.settings import Settings

logger = logging.getLogger("ray.serve")

READY_WITHIN_S = 2.0


class Gateway:
    """Admits, reads and decodes requests, and hands uint8[S, S, 3] to the engine's replicas."""

    model: ModelInfo

    async def __init__(self, captioner: DeploymentHandle, settings: Settings) -> None:  # type: ignore[misc]
        self.max_image_bytes = settings.image.max_file_bytes
        self.timeout_s = settings.timeout_s
        self._max_in_flight = settings.max_in_flight
        self._num_in_flight = 0
        self._captioner = captioner
        # Only the captioner knows what "auto" means on its device; this also waits for the weights.
        self.model = await captioner.info.remote()
        self.options: GenerationOptions = settings.options.resolve(self.model.generation_config)
        self._decoder = DecodePool(self.model.image_size_px, settings.image, settings.decode_children)
        self._decoder.decode([b"-"] * settings.decode_children)  # starts the children
        logger.info("%s", self._decoder.sandbox_report())
        self._decode_threads = ThreadPoolExecutor(settings.decode_children, "decode")

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_api(self)

    def admit(self) -> None:
        if self._num_in_flight >= self._max_in_flight:
            message = f"{self._num_in_flight} requests are being served; try again in {RETRY_AFTER_S} s"
            raise ApiError(503, "overloaded", message)
        self._num_in_flight += 1

    def leave(self) -> None:
        self._num_in_flight -= 1

    async def caption(self, call: CaptionCall) -> tuple[Result, int | None, int | None]:
        image = await self._decode(call.image)
        if image.status is not Status.OK:
            raise of_status(image.status, image.error)
        pixels = image.array(self.model.image_size_px)
        response = self._captioner.caption.remote(pixels, call.prompt, call.options)
        try:
            result: Result = await response
        except asyncio.CancelledError:
            # The time is over, or the client has disconnected: free the slot of the engine.
            response.cancel()
            raise
        except (BackPressureError, DeploymentUnavailableError, RayActorError):
            message = f"no engine can take the request now; try again in {RETRY_AFTER_S} s"
            raise ApiError(503, "overloaded", message) from None
        if result.status is not Status.OK:
            raise of_status(result.status, result.error)
        return result, image.width, image.height

    async def check_ready(self) -> None:
        try:
            async with asyncio.timeout(READY_WITHIN_S):
                await self._captioner.info.remote()
        except (TimeoutError, BackPressureError, DeploymentUnavailableError, RayActorError):
            raise ApiError(503, "not_ready", "no engine answers; one may be starting") from None

    async def _decode(self, image: bytes) -> DecodedImage:
        loop = asyncio.get_running_loop()
        [decoded] = await loop.run_in_executor(self._decode_threads, self._decoder.decode, [image])
        return decoded

    def __del__(self) -> None:
        if hasattr(self, "_decode_threads"):
            self._decode_threads.shutdown(wait=False, cancel_futures=True)
            self._decoder.close()
