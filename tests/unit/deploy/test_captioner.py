"""A replica that is no longer useful ends or says so; one whose caller has left stops working for it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest

from blip2_actor import GenerationOptions
from blip2_actor.testing import FakeEngineConfig
from deploy import captioner
from deploy.captioner import Captioner
from deploy.work import (
    BatchWork,
    ImageOutputs,
    ImageWork,
    ScoreOfBatch,
    TextOfBatch,
    TextPiece,
    TextToGenerate,
    TextToScore,
)

PIXELS = np.zeros((32, 32, 3), np.uint8)
WORK = ImageWork(texts=(TextToGenerate(prompt=None, options=GenerationOptions()),))


class Ended(BaseException):
    """Stands for the end of the process."""


@pytest.fixture
def replica() -> Iterator[Captioner]:
    made = Captioner(FakeEngineConfig(), GenerationOptions())
    yield made
    made._actor.close()


def test_an_engine_that_fails_ends_the_process(replica: Captioner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve would send all requests to the replica that fails fastest."""

    def end(status: int) -> None:
        assert status == 1
        raise Ended

    def fail(*_: Any) -> Any:
        raise RuntimeError("the engine has failed")

    monkeypatch.setattr(captioner.os, "_exit", end)
    monkeypatch.setattr(replica._actor, "submit", fail)

    async def stream() -> None:
        async for _ in replica.stream(PIXELS, WORK):
            pass

    for work in (replica.run(PIXELS, WORK), stream()):
        with pytest.raises(Ended):
            asyncio.run(work)


def test_only_an_engine_with_work_and_without_progress_is_unhealthy(
    replica: Captioner, monkeypatch: pytest.MonkeyPatch
) -> None:
    idle = replica.stats()
    busy = replace(idle, num_running=1)
    advanced = replace(busy, num_decode_steps=1)
    for stats, late in ((idle, False), (advanced, False), (busy, False), (busy, True)):
        monkeypatch.setattr(replica._actor, "stats", lambda stats=stats: stats)
        replica._progress_at_s -= 2 * captioner.STALLED_AFTER_S
        if late:
            with pytest.raises(RuntimeError, match="no progress for 240 s with 1 running"):
                replica.check_health()
        else:
            replica.check_health()


async def test_a_stream_that_is_left_stops_its_work(
    replica: Captioner, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = asyncio.Event()

    async def make(pixels: Any, work: Any, report: Callable[[int, str], None]) -> ImageOutputs:
        report(0, "a")
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()
        raise AssertionError("unreachable")

    monkeypatch.setattr(replica, "_make", make)
    items = replica.stream(PIXELS, WORK)
    assert await anext(items) == TextPiece(index=0, text="a")
    await items.aclose()
    async with asyncio.timeout(5):
        await stopped.wait()


def test_batch_work_that_waits_for_others_holds_none_of_their_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Features of low priority wait while others, who may also want features, keep the engine busy."""
    monkeypatch.setattr(captioner, "NUM_WAITING_THREADS", 1)
    replica = Captioner(FakeEngineConfig(), GenerationOptions())
    engine = replica._actor.engine
    make, goes_on = engine.features, threading.Event()

    def features(images: Any, **wanted: Any) -> Any:
        assert not getattr(images[0], "low_priority", False) or goes_on.wait(10)
        return make(images, **wanted)

    monkeypatch.setattr(engine, "features", features)

    async def ask_both() -> tuple[ImageOutputs, list[Any]]:
        async def batch() -> list[Any]:
            work = BatchWork(features=(0,))
            return [one async for one in replica.run_batch(PIXELS[None], work, replica.info().digest)]

        waiting = asyncio.ensure_future(batch())
        await asyncio.sleep(0)
        outputs = await asyncio.wait_for(replica.run(PIXELS, ImageWork(features=True)), 5)
        goes_on.set()
        return outputs, await waiting

    outputs, batch = asyncio.run(ask_both())
    assert outputs.features is not None and batch[0][0][1].status == "ok"
    replica._actor.close()


@pytest.mark.parametrize("is_batch", [False, True])
def test_a_caller_that_leaves_frees_the_thread_that_waits_for_its_features(
    monkeypatch: pytest.MonkeyPatch, is_batch: bool
) -> None:
    """Those of low priority may wait for the encoders as long as others keep them busy."""
    replica = Captioner(FakeEngineConfig(), GenerationOptions())
    begun, ended = threading.Event(), threading.Event()

    def features(images: Any, **wanted: Any) -> Any:
        encoded: Future[None] = Future()
        images[0].note_wait(encoded)
        begun.set()
        try:
            encoded.result(timeout=10)
        except CancelledError:
            ended.set()
            raise

    monkeypatch.setattr(replica._actor.engine, "features", features)

    async def leave() -> None:
        async def batch() -> list[Any]:
            work = BatchWork(features=(0,))
            return [one async for one in replica.run_batch(PIXELS[None], work, replica.info().digest)]

        call = batch() if is_batch else replica.run(PIXELS, ImageWork(features=True))
        waiting = asyncio.ensure_future(call)
        assert await asyncio.to_thread(begun.wait, 5)
        waiting.cancel()
        await asyncio.wait({waiting})

    asyncio.run(leave())
    assert ended.wait(5)
    replica._actor.close()


def test_batch_work_keeps_the_names_by_which_it_travels() -> None:
    """During an update of an endpoint, gateways and captioners of two versions work together."""
    asked = TextToGenerate(prompt=None, options=GenerationOptions())
    texts, scores = (TextOfBatch(0, asked),), (ScoreOfBatch(1, TextToScore(text="a")),)
    work = BatchWork(texts=texts, scores=scores, features=(2,))
    classes = [type(one) for one in (work, *texts, texts[0].text, *scores, scores[0].text)]
    assert {one.__module__ for one in classes} == {"deploy.work"}
    assert [one.__qualname__ for one in classes] == [
        "BatchWork",
        "TextOfBatch",
        "TextToGenerate",
        "ScoreOfBatch",
        "TextToScore",
    ]
    assert asdict(work) == {
        "texts": ({"image": 0, "text": asdict(asked)},),
        "scores": ({"image": 1, "text": {"text": "a", "prompt": None}},),
        "features": (2,),
    }
