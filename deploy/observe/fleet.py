"""All replicas of the application at once: for the operator, whose request reaches only one gateway."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Any

from ray import serve

from deploy.observe.logs import LogLevel

GATEWAYS, CAPTIONERS = "Gateway", "Captioner"
"""The deployments of an application."""


class Fleet:
    """The gateways and the captioners; every call reaches each replica that runs."""

    def __init__(self, application: str) -> None:
        self._application = application

    async def set_draining(self, is_draining: bool) -> None:
        """Have every gateway refuse new requests, or take them again."""
        await self._everywhere(GATEWAYS, "set_draining", is_draining)

    async def set_log_level(self, level: LogLevel) -> None:
        await asyncio.gather(
            self._everywhere(GATEWAYS, "set_log_level", level),
            self._everywhere(CAPTIONERS, "set_log_level", level),
        )

    async def stats(self) -> dict[str, list[dict[str, Any]]]:
        """Return the counters of each replica."""
        gateways, engines = await asyncio.gather(
            self._everywhere(GATEWAYS, "stats"), self._everywhere(CAPTIONERS, "stats")
        )
        return {"gateways": gateways, "engines": [asdict(stats) for stats in engines]}

    async def _everywhere(self, deployment: str, method: str, *arguments: Any) -> list[Any]:
        replicas = serve.get_deployment_handle(deployment, self._application)
        answers: list[Any] = await replicas.broadcast(method, *arguments).results_async()
        return answers
