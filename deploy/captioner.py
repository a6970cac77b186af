"""The replica on the accelerator: one engine for every request that reaches it.

The rule: a bad request is a result with a status. An exception means that the engine itself has failed, and
the replica ends, so that Serve replaces it. `Captioner` is a plain class that imports no Ray; `deploy.app`
makes a deployment of it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time

import numpy as np

from blip2_actor import Blip2Actor, EngineBuilder, EngineStats, GenerationOptions, ModelInfo, Request, Result

logger = logging.getLogger("ray.serve")

STALLED_AFTER_S = 120.0
"""An engine that has work and makes no progress for this long is replaced; compiling takes less."""


class Captioner:
    """One engine. It takes pixels only: untrusted bytes are decoded elsewhere."""

    def __init__(self, engine: EngineBuilder, options: GenerationOptions) -> None:
        self._actor = Blip2Actor(engine, options)
        self._progress: tuple[int, ...] = ()
        self._progress_at_s = time.monotonic()

    async def caption(self, pixels: np.ndarray, prompt: str | None, options: GenerationOptions) -> Result:
        """Caption uint8[S, S, 3]; a caller that disconnects frees its slot."""
        request = Request(image=pixels, prompt=prompt, options=options)
        try:
            return await asyncio.wrap_future(self._actor.submit(request))
        except Exception:
            # A replica without an engine would answer fastest, and Serve would send it all requests until
            # the next health check.
            logger.exception("the engine has failed; this replica ends, so that Serve replaces it")
            os._exit(1)

    def info(self) -> ModelInfo:
        return self._actor.info

    def stats(self) -> EngineStats:
        return self._actor.stats()

    def check_health(self) -> None:
        """Raise RuntimeError when the engine has work and makes no progress; Serve replaces the replica."""
        stats = self._actor.stats()
        progress = (stats.num_finished, stats.num_encode_calls, stats.num_decode_steps)
        now_s = time.monotonic()
        if progress != self._progress or stats.num_running + stats.num_waiting == 0:
            self._progress, self._progress_at_s = progress, now_s
        elif now_s - self._progress_at_s > STALLED_AFTER_S:
            raise RuntimeError(
                f"the engine has made no progress for {now_s - self._progress_at_s:.0f} s "
                f"with {stats.num_running} running and {stats.num_waiting} waiting requests"
            )

    def __del__(self) -> None:
        # Serve calls this after the last request; when the constructor has failed, there is no actor.
        if hasattr(self, "_actor"):
            self._actor.close()
