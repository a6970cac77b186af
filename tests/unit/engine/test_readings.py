"""Calls that wait for the encoders, without a model."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import Any, cast

import numpy as np
import pytest

from blip2_actor.engine.core import EngineCore
from blip2_actor.engine.encoded_image import EncodedImage
from blip2_actor.engine.input_processor import InputProcessor
from blip2_actor.engine.readings import Readings
from blip2_actor.engine.request_state import RequestState


class BusyCore:
    """Never encodes anything."""

    def __init__(self) -> None:
        self.enqueued: list[RequestState] = []
        self.has_more = threading.Event()

    def require_caller_may_wait(self) -> None: ...

    def enqueue(self, items: list[RequestState]) -> None:
        self.enqueued += items
        self.has_more.set()


class TakesHandles:
    def image(self, image: EncodedImage) -> EncodedImage:
        return image


@pytest.mark.parametrize("is_cancelled_before", [False, True])
def test_a_call_for_an_image_that_is_cancelled_ends(is_cancelled_before: bool) -> None:
    """Its thread was held until the encoders had time for an image that nobody wanted any longer."""
    core, image = BusyCore(), EncodedImage(np.zeros((2, 2, 3), np.uint8), low_priority=True)
    readings = Readings(cast(EngineCore, core), cast(InputProcessor, TakesHandles()))

    def read() -> Any:
        return readings.features([image], False, False, False)

    if is_cancelled_before:
        image.cancel()
    with ThreadPoolExecutor() as threads:
        call = threads.submit(read)
        assert core.has_more.wait(5)
        image.cancel()
        with pytest.raises(CancelledError):
            call.result(timeout=5)
    assert core.enqueued[0].is_dropped()
