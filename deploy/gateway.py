"""The replica that callers reach: HTTP, admission and image decoding on CPU.

The rule: untrusted bytes end here. They are decoded in child processes with limits, and only pixels go on
to a `Captioner`. `Gateway` is a plain class; `deploy.app` makes the ingress deployment of it.
"""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager
from typing import Any

from fastapi import FastAPI
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from blip2_actor import GenerationOptions, ModelInfo, Result, Status
from deploy.guard.access import Access
from deploy.guard.admission import Admission
from deploy.guard.cost import Cost
from deploy.guard.decoding import Decoding
from deploy.guard.keys import KeyFile
from deploy.http.api import create_api
from deploy.http.errors import RETRY_AFTER_S, ApiError, of_status
from deploy.http.request_body import CaptionCall
from deploy.settings import Settings

READY_WITHIN_S = 2.0


class Gateway:
    """Admits, reads and decodes requests, and hands uint8[S, S, 3] to the engine's replicas."""

    model: ModelInfo

    async def __init__(self, captioner: DeploymentHandle, settings: Settings) -> None:  # type: ignore[misc]
        self.options: GenerationOptions = settings.options
        self.max_image_bytes = settings.image.max_file_bytes
        self._access: dict[str, Any] = {
            "allowed_hosts": settings.allowed_hosts,
            "allowed_origins": settings.allowed_origins,
            "keys": None if settings.keys_file is None else KeyFile(settings.keys_file),
            "max_in_flight": max(1, settings.max_in_flight // 2),
        }
        self._admission = Admission(
            slots=settings.slots, max_in_flight=settings.max_in_flight, timeout_s=settings.timeout_s
        )
        self._captioner = captioner
        # Only the captioner knows what "auto" means on its device; this also waits for the weights.
        self.model = await captioner.info.remote()
        self._decoding = Decoding(self.model.image_size_px, settings.image, settings.decode_children)

    def __serve_build_asgi_app__(self) -> FastAPI:
        api = create_api(self)
        api.add_middleware(Access, **self._access)
        return api

    def admit(self, cost: Cost) -> AbstractAsyncContextManager[None]:
        return self._admission.admit(cost)

    async def caption(self, call: CaptionCall) -> tuple[Result, int | None, int | None]:
        image = await self._decoding.decode(call.image)
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

    def __del__(self) -> None:
        if hasattr(self, "_decoding"):
            self._decoding.close()
