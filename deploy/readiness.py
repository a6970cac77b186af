"""Whether engines are there, from what Serve's controller knows: none is asked, and none is started."""

from __future__ import annotations

import asyncio
import time

from ray import serve
from ray.serve.handle import DeploymentHandle

from deploy.http.errors import not_ready

KNOWN_FOR_S = 2.0
"""How long an answer of the controller is good for, however many probes come."""
ANSWER_WITHIN_S = 5.0


class Readiness:
    """Ready while an engine runs, however long its line is, and while all were stopped for want of work."""

    def __init__(self, engines: DeploymentHandle) -> None:
        self._application = engines.app_name
        self._deployment = engines.deployment_name
        self._is_ready = True  # a gateway starts after an engine has answered
        self._known_at_s = time.monotonic()
        self._asking: asyncio.Task[None] | None = None

    async def check(self) -> None:
        """Raise ApiError 503 unless engines run, or would be started for a request."""
        if time.monotonic() - self._known_at_s > KNOWN_FOR_S:
            if self._asking is None or self._asking.done():
                self._asking = asyncio.create_task(self._ask())
            await asyncio.wait([self._asking], timeout=ANSWER_WITHIN_S)  # else the last answer counts
        if not self._is_ready:
            raise not_ready("no engine runs; one may be starting")

    async def _ask(self) -> None:
        status = await asyncio.to_thread(serve.status)
        self._known_at_s = time.monotonic()
        application = status.applications.get(self._application)
        engines = None if application is None else application.deployments.get(self._deployment)
        self._is_ready = engines is not None and (
            engines.replica_states.get("RUNNING", 0) > 0 or engines.status == "HEALTHY"
        )
