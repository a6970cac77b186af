"""The trials of a gateway: which model answers, which requests are copied, and what is recorded of both."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from blip2_actor import Result
from deploy.calls.remote_captioner import Models
from deploy.http.errors import ApiError
from deploy.http.served_model import ServedModel
from deploy.observe.metrics import SHADOW_REQUESTS
from deploy.observe.request_record import OF_NO_REQUEST, RECORD
from deploy.reuse.made import Made
from deploy.settings import Settings
from deploy.trials.recording import Recorder, Side
from deploy.work import BatchWork, ImageWork, TextOfBatch

MAX_COPIES = 16
"""Maximum number of copies under way at once; further ones are dropped."""

logger = logging.getLogger("ray.serve")


class Trials:
    """The trials of one gateway; without any in the settings it does nothing."""

    def __init__(self, settings: Settings, models: Models, is_busy: Callable[[], bool]) -> None:
        """
        Args:
            is_busy: returns whether requests wait, so that no copy should be made.
        """
        self._ab_test, self._shadow = settings.ab_test_share, settings.shadow_share
        self._timeout_s = settings.timeout_s
        self._models = models
        self._is_busy = is_busy
        self._copies: set[asyncio.Task[None]] = set()
        self.recorder: Recorder | None = None
        if settings.trial_record is not None:
            self.recorder = Recorder(settings.trial_record, settings.trial_prompts)

    def choose(self, first: ServedModel) -> ServedModel:
        """Return the model for a request that names none: the first one until the other one runs."""
        if self._ab_test is None or RECORD.get() is OF_NO_REQUEST:
            return first
        RECORD.get().is_in_ab_test = True
        if not self._ab_test.has(RECORD.get().request_id):
            return first
        return self._models.known(self._ab_test.model) or first

    def record_answer(self, model: ServedModel, work: ImageWork, made: Made) -> None:
        """Record the answer of a model in an A/B test, unless the request named the model."""
        if self.recorder is None or self._ab_test is None or not RECORD.get().is_in_ab_test:
            return
        side: Side = "A" if model.is_first else "B"
        (text, *_), (result, *_) = work.texts, made.outputs.texts
        name = model.made_by(made.outputs.model).name
        self.recorder.add("ab_test", side, RECORD.get().request_id, name, text.prompt, result, made)

    def copy(self, first: ServedModel, pixels: np.ndarray, work: ImageWork, made: Made) -> None:
        """Have the shadow model make the texts that the first model has made; neither waits nor raises.

        Args:
            pixels: uint8[S, S, 3].
        """
        if self._shadow is None or not work.texts or not self._shadow.has(RECORD.get().request_id):
            return
        if len(self._copies) >= MAX_COPIES or self._is_busy():
            SHADOW_REQUESTS.inc(1, {"result": "dropped"})
            return
        copying = asyncio.create_task(self._copy(self._shadow.model, first, pixels, work, made))
        self._copies.add(copying)
        copying.add_done_callback(self._copies.discard)

    async def _copy(
        self, name: str, first: ServedModel, pixels: np.ndarray, work: ImageWork, made: Made
    ) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                result = await self._first_text(name, pixels, work)
        except Exception as error:  # callers must not see what happens to a copy
            if not isinstance(error, (ApiError, TimeoutError)):
                logger.exception("the copy of a request has failed")
            SHADOW_REQUESTS.inc(1, {"result": "failed"})
            return
        SHADOW_REQUESTS.inc(1, {"result": "made"})
        if self.recorder is not None:
            request, prompt = RECORD.get().request_id, work.texts[0].prompt
            by_first = first.made_by(made.outputs.model).name
            self.recorder.add("shadow", "A", request, by_first, prompt, made.outputs.texts[0], made)
            self.recorder.add("shadow", "B", request, name, prompt, result, replace(made, num_tokens=None))

    async def _first_text(self, name: str, pixels: np.ndarray, work: ImageWork) -> Result:
        """Generate all texts at low priority; return the first."""
        model = await self._models.get(name)
        batch = BatchWork(texts=tuple(TextOfBatch(image=0, text=text) for text in work.texts))
        captioner = self._models.captioner(model)
        results: dict[int, Result] = {}
        async for finished in captioner.run_batch(pixels[None], batch, model.info.digest):
            results.update((index, one) for index, one in finished if isinstance(one, Result))
        return results[0]

    def write_if_due(self) -> None:
        """Write rows that have waited long enough, however few they are."""
        if self.recorder is not None:
            self.recorder.write_if_due()

    def close(self) -> None:
        """Write the recorded rows, and abandon the copies under way."""
        if self.recorder is not None:
            self.recorder.close()
