"""Whether engines run, according to Serve's controller: no engine is asked, and none is started."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from ray import serve

from deploy.calls.shared_calls import begin_shared
from deploy.http.errors import not_ready

KNOWN_FOR_S = 2.0
"""How long an answer of the controller is good for, however many probes come."""
ANSWER_WITHIN_S = 5.0


class Readiness:
    """Ready while an engine runs, however long its queue is, and while all are stopped for lack of work."""

    def __init__(self, application: str, deployments: Sequence[str]) -> None:
        """Start as ready, as a gateway starts after an engine has answered.

        Args:
            application: the application.
            deployments: the captioners of each model; the service is ready while one model is.
        """
        self._application = application
        self._deployments = deployments
        self._is_ready = True
        self._known_at_s = time.monotonic()
        self._asking: asyncio.Task[None] | None = None

    async def check(self) -> None:
        """Raise ApiError 503 unless engines run, or would be started for a request."""
        if time.monotonic() - self._known_at_s > KNOWN_FOR_S:
            if self._asking is None or self._asking.done():
                self._asking = begin_shared(self._ask())
            await asyncio.wait([self._asking], timeout=ANSWER_WITHIN_S)  # else the last answer counts
        if not self._is_ready:
            raise not_ready("no engine runs; one may be starting")

    async def _ask(self) -> None:
        status = await asyncio.to_thread(serve.status)
        self._known_at_s = time.monotonic()
        application = status.applications.get(self._application)
        known = {} if application is None else application.deployments
        engines = [known[name] for name in self._deployments if name in known]
        self._is_ready = any(
            one.replica_states.get("RUNNING", 0) > 0 or one.status == "HEALTHY" for one in engines
        )
