"""All replicas of the application at once: for the operator, whose request reaches only one gateway.

Whether the service is drained is stored in the cluster, so that gateways that start later know it too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

from ray import serve
from ray.exceptions import RayActorError
from ray.experimental import internal_kv
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from deploy.observe.logs import LogLevel

GATEWAYS = "Gateway"
"""The deployment of the gateways."""
ATTEMPTS, PAUSE_S = 20, 0.1
"""A new handle does not know at once which replicas run."""


NAMESPACE = "blip2"
"""Namespace of what is stored in the cluster."""


class Fleet:
    """The gateways and the captioners; every call reaches each replica that runs."""

    def __init__(self, application: str, captioners: Sequence[str]) -> None:
        """Know where the replicas are.

        Args:
            application: the application.
            captioners: the deployments of captioners, one for each model.
        """
        self._application = application
        self._captioners = captioners
        self._handles: dict[str, DeploymentHandle] = {}
        # While the head of the cluster is away, calls to it do not return.
        self._asking_head = ThreadPoolExecutor(1, "ask-head")
        self._reading: asyncio.Future[bool] | None = None

    async def set_draining(self, is_draining: bool) -> None:
        """Have every gateway refuse new requests, or take them again, those that start later included."""
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._asking_head, self._store_draining, is_draining)
        await self._everywhere(GATEWAYS, "set_draining", is_draining)

    async def is_draining(self) -> bool:
        """Return whether an operator has drained the service and not resumed it.

        A caller may give up; the next one waits for the same answer, so that at most one thread is busy.
        """
        if self._reading is None or self._reading.done():
            loop = asyncio.get_running_loop()
            self._reading = loop.run_in_executor(self._asking_head, self._read_draining)
            self._reading.add_done_callback(lambda read: read.cancelled() or read.exception())
        return await asyncio.shield(self._reading)

    @property
    def _drained(self) -> str:
        return f"drained:{self._application}"

    def _read_draining(self) -> bool:
        return internal_kv._internal_kv_get(self._drained, namespace=NAMESPACE) is not None

    def _store_draining(self, is_draining: bool) -> None:
        if is_draining:
            internal_kv._internal_kv_put(self._drained, "1", namespace=NAMESPACE)
        else:
            internal_kv._internal_kv_del(self._drained, namespace=NAMESPACE)

    async def set_log_level(self, level: LogLevel) -> None:
        everyone = (GATEWAYS, *self._captioners)
        await asyncio.gather(*(self._everywhere(name, "set_log_level", level) for name in everyone))

    async def stats(self) -> dict[str, list[dict[str, Any]]]:
        """Return the counters of each replica."""
        everyone = (GATEWAYS, *self._captioners)
        gateways, *engines = await asyncio.gather(*(self._everywhere(name, "stats") for name in everyone))
        return {
            "gateways": gateways,
            "engines": [
                asdict(stats) | {"deployment": deployment}
                for deployment, found in zip(self._captioners, engines, strict=True)
                for stats in found
            ],
        }

    async def _everywhere(self, deployment: str, method: str, *arguments: Any) -> list[Any]:
        """Call a method of every replica; none is started, so the list is empty if none runs.

        A replica that dies meanwhile gives no answer; its replacement reads what it needs from the store.
        """
        if deployment not in self._handles:
            self._handles[deployment] = serve.get_deployment_handle(deployment, self._application)
        for _ in range(ATTEMPTS):
            try:
                call = self._handles[deployment].broadcast(method, *arguments)
                answers = await call.results_async(return_exceptions=True)
            except DeploymentUnavailableError:
                await asyncio.sleep(PAUSE_S)
                continue
            for answer in answers:
                if isinstance(answer, BaseException) and not isinstance(answer, RayActorError):
                    raise answer
            return [answer for answer in answers if not isinstance(answer, RayActorError)]
        return []
