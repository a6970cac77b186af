"""The replica that callers reach: HTTP, admission and image decoding on CPU.

The rule: untrusted bytes end here. They are decoded in child processes with limits, and only pixels go on
to a `Captioner`. `Gateway` is a plain class; `deploy.app` makes the ingress deployment of it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from ray.exceptions import RayError
from ray.serve.handle import DeploymentHandle

from deploy.calls.remote_captioner import Models, RemoteCaptioner
from deploy.guard.access import Access
from deploy.guard.keys import KeyFile
from deploy.guard.uploads import give_back_large_memory, take_passed_bodies
from deploy.http.api import create_api
from deploy.observe.fleet import Fleet
from deploy.observe.logs import LogLevel, set_log_level
from deploy.observe.request_record import AccessLog
from deploy.readiness import Readiness
from deploy.reuse.finished_run import FinishedRun
from deploy.service import Service
from deploy.settings import Settings

logger = logging.getLogger("ray.serve")

STORE_WITHIN_S = 5.0
"""Maximum seconds for asking the cluster whether the service is drained."""


class Gateway(Service):
    """The service behind HTTP: who may ask, whether it takes requests, and its end in good order."""

    async def __init__(  # type: ignore[misc]
        self,
        captioner: DeploymentHandle,
        settings: Settings,
        others: Mapping[str, DeploymentHandle] | None = None,
    ) -> None:
        """Wait for the engines of the first model; those of others may be stopped until a request names them.

        Args:
            captioner: the replicas of the first model.
            settings: what the endpoint is built from.
            others: the replicas of further models, by name.
        """
        give_back_large_memory()
        take_passed_bodies()
        self._access: dict[str, Any] = {
            "allowed_hosts": settings.allowed_hosts,
            "allowed_origins": settings.allowed_origins,
            "keys": None if settings.keys_file is None else KeyFile(settings.keys_file),
            "admin_keys": None if settings.admin_keys_file is None else KeyFile(settings.admin_keys_file),
            "max_in_flight": max(1, settings.max_in_flight // 2),
        }
        others = others or {}
        remote = {name: RemoteCaptioner(handle) for name, handle in others.items()}
        models = Models(RemoteCaptioner(captioner), remote, settings)
        await models.start()
        finished_run = None
        if settings.cache_from is not None:
            finished_run = FinishedRun(settings.cache_from, models.first.info, settings.image)
            await asyncio.to_thread(finished_run.read_index)
        deployments = [handle.deployment_name for handle in (captioner, *others.values())]
        readiness = Readiness(captioner.app_name, deployments)
        super().__init__(settings, models, readiness, Fleet(captioner.app_name, deployments), finished_run)
        logger.info("%s", self._decoding.of(self.first.info.image_size_px).sandbox_report())
        self._was_told = False
        """Whether the operator has called since the store was last read; the next value read may be older."""
        await self.check_health()
        if self.stats()["is_draining"]:
            logger.warning("an operator has drained the service; POST /admin/resume ends that")

    def __serve_build_asgi_app__(self) -> FastAPI:
        api = create_api(self)
        api.add_middleware(Access, **self._access)
        api.add_middleware(AccessLog)
        return api

    async def drain(self) -> None:
        """Be unready, refuse new requests, and return when the running ones have their answers."""
        await self._admission.drain()

    async def check_health(self) -> None:
        """Set the metrics, and follow the operator's last call to all gateways, in case it was missed."""
        self._admission.show()
        self._shared_work.show()
        try:
            async with asyncio.timeout(STORE_WITHIN_S):
                is_draining = await self.fleet.is_draining()
        except (RayError, TimeoutError):  # the head of the cluster is away; this gateway can go on without it
            return
        if not self._was_told:
            self._admission.set_draining(is_draining)
        self._was_told = False
        self._trials.write_if_due()

    def set_draining(self, is_draining: bool) -> None:
        """Be unready and refuse new requests, or take them again; a gateway that ends takes none again."""
        self._was_told = True
        self._admission.set_draining(is_draining)

    def set_log_level(self, level: LogLevel) -> None:
        set_log_level(level)

    def stats(self) -> dict[str, int | bool]:
        """Return what this gateway is doing now."""
        return self._admission.stats()

    def __del__(self) -> None:
        if hasattr(self, "_decoding"):
            self._decoding.close()
            self._fetching.close()
            self._trials.close()
