"""Calls that wait for the encoders."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from blip2_actor import Status
from blip2_actor.engine.core import EngineCore
from blip2_actor.engine.encoded_image import EncodedImage
from blip2_actor.engine.input_processor import InputProcessor
from blip2_actor.engine.readings import Reader
from blip2_actor.engine.request_state import RequestState
from blip2_actor.testing import random_images, save_tiny_checkpoint
from tests.engines import cpu_config


class BusyCore:
    """An engine without a model that never encodes anything."""

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
    """Its thread used to be held until the encoders had time for an image that nobody wanted."""
    core, image = BusyCore(), EncodedImage(np.zeros((2, 2, 3), np.uint8), low_priority=True)
    readings = Reader(cast(EngineCore, core), cast(InputProcessor, TakesHandles()))

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


def test_a_call_that_ends_for_one_image_lets_the_others_go() -> None:
    """The encoders used to continue with all of them, for nobody."""
    core = BusyCore()
    images = [EncodedImage(np.zeros((2, 2, 3), np.uint8)) for _ in range(3)]
    images[1].cancel()
    readings = Reader(cast(EngineCore, core), cast(InputProcessor, TakesHandles()))
    with ThreadPoolExecutor() as threads:
        call = threads.submit(readings.features, images, False, False, False)
        assert core.has_more.wait(5)
        images[0].cancel()
        with pytest.raises(CancelledError):
            call.result(timeout=5)
    assert all(state.is_dropped() for state in core.enqueued)


def test_an_image_that_does_not_fit_even_alone_is_an_entry_with_a_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tensors used to be read without checking the result, so the call ended in an AttributeError."""
    config = cpu_config(save_tiny_checkpoint(tmp_path), max_slots=1, encode_batch=1, skip_self_test=True)
    good, bad = (image.numpy() for image in random_images(2))
    with config.build() as engine:
        runner = engine._core.runner
        encode = runner.encode

        def encode_small(images: list[EncodedImage]) -> None:
            if np.array_equal(images[0].pixels, bad):
                raise torch.OutOfMemoryError("not enough")
            encode(images)

        monkeypatch.setattr(runner, "encode", encode_small)
        features = engine.features([good, bad, good])
        scores = engine.score([bad, good], ["a", "a"])
    assert [entry.status for entry in features] == [Status.OK, Status.FAILED, Status.OK]
    assert [entry.status for entry in scores] == [Status.FAILED, Status.OK]
    assert features[1].error == scores[0].error == "out of memory: not enough"
