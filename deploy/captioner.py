"""The accelerator's side: a replica that runs one engine for every request that reaches it.

A plain class that knows no Ray; `app` makes a deployment of it.
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
"""An engine with work that finishes nothing for so long is replaced; compiling takes less."""


class Captioner:
    """One engine. Takes pixels only: whatever strangers sent was decoded elsewhere."""

    def __init__(self, engine: EngineBuilder, options: GenerationOptions) -> None:
        self._actor = Blip2Actor(engine, options)
        self._progress: tuple[int, ...] = ()
        self._progress_at_s = time.monotonic()

    async def caption(self, pixels: np.ndarray, prompt: str | None, options: GenerationOptions) -> Result:
        """Caption uint8[S, S, 3]; a caller that goes away frees its slot."""
        request = Request(image=pixels, prompt=prompt, options=options)
        try:
            return await asyncio.wrap_future(self._actor.submit(request))
        except Exception:
            # A bad request is a result with a status; what is raised is the end of the engine. A replica
            # without one would answer fastest and draw all requests until its health is next asked for.
            logger.exception("the engine has failed; this replica ends, to be replaced")
            os._exit(1)

    def info(self) -> ModelInfo:
        return self._actor.info

    def stats(self) -> EngineStats:
        return self._actor.stats()

    def check_health(self) -> None:
        """Raise when the engine has work and does none, so that Serve replaces this replica."""
        stats = self._actor.stats()
        progress = (stats.num_finished, stats.num_encode_calls, stats.num_decode_steps)
        now_s = time.monotonic()
        if progress != self._progress or stats.num_running + stats.num_waiting == 0:
            self._progress, self._progress_at_s = progress, now_s
        elif now_s - self._progress_at_s > STALLED_AFTER_S:
            raise RuntimeError(
                f"the engine has finished nothing for {now_s - self._progress_at_s:.0f} s "
                f"with {stats.num_running} running and {stats.num_waiting} waiting requests"
            )

    def __del__(self) -> None:
        # Serve calls this once the replica is drained; an unfinished constructor has no actor.
        if hasattr(self, "_actor"):
            self._actor.close()
