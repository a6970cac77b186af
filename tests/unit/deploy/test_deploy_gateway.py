"""How a gateway turns the engine's answers into its own, with a handle whose answers the test chooses."""

from __future__ import annotations

import asyncio
import io
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from PIL import Image
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import DeploymentUnavailableError

from blip2_actor import GenerationOptions, ModelInfo, Result, Status
from deploy.gateway import Gateway
from deploy.http.errors import ApiError
from deploy.http.request_body import CaptionCall
from deploy.settings import Settings


class Response:
    """Like Serve's response: ending the wait does not stop the work, only `cancel` does."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.cancelled = False

    def __await__(self) -> Any:
        if self.answer is None:
            yield from asyncio.Event().wait().__await__()
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def cancel(self) -> None:
        self.cancelled = True


class Method:
    def __init__(self, answer: Any) -> None:
        self.response = Response(answer)

    def remote(self, *_: Any) -> Response:
        return self.response


class Handle:
    def __init__(self, answer: Any) -> None:
        self.info = Method(ModelInfo(model="m", image_size_px=8, dtype="float32", digest="d"))
        self.caption = Method(answer)


@asynccontextmanager
async def gateway(handle: Handle, **settings: Any) -> AsyncIterator[Gateway]:
    made = Gateway.__new__(Gateway)
    await made.__init__(handle, Settings(decode_children=1, **settings))  # type: ignore[misc]
    try:
        yield made
    finally:
        made.__del__()
        del made._decode_threads  # already closed


def picture() -> CaptionCall:
    file = io.BytesIO()
    Image.new("RGB", (10, 6)).save(file, "PNG")
    return CaptionCall(image=file.getvalue(), prompt=None, options=GenerationOptions())


def refusals(answers: list[Any]) -> list[tuple[int, str]]:
    async def ask() -> list[tuple[int, str]]:
        said = []
        async with gateway(handle := Handle(None)) as made:
            for answer in answers:
                handle.caption = Method(answer)
                with pytest.raises(ApiError) as caught:
                    await made.caption(picture())
                said.append((caught.value.code, caught.value.type))
        return said

    return asyncio.run(ask())


def test_the_log_says_what_the_decode_sandbox_is(caplog: pytest.LogCaptureFixture) -> None:
    async def start() -> None:
        async with gateway(Handle(None)):
            pass

    with caplog.at_level(logging.INFO, "ray.serve"):
        asyncio.run(start())
    assert "decode sandbox: " in caplog.text


def test_a_timeout_cancels_the_work() -> None:
    handle = Handle(None)

    async def ask() -> None:
        async with gateway(handle) as made:
            decoded = await made._decode(picture().image)
            assert (decoded.width, decoded.height) == (10, 6)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await made.caption(picture())

    asyncio.run(ask())
    assert handle.caption.response.cancelled


def test_an_engine_that_has_died_is_503() -> None:
    gone = [ActorDiedError(), DeploymentUnavailableError("Captioner")]
    assert refusals(gone) == [(503, "overloaded")] * 2


def test_every_status_but_ok_is_an_error_of_its_name() -> None:
    statuses = [status for status in Status if status is not Status.OK]
    codes = {Status.FAILED: 500, Status.TOO_LARGE: 413}
    assert refusals([Result(status=status, error="why") for status in statuses]) == [
        (codes.get(status, 422), status.value) for status in statuses
    ]


def test_at_the_limit_no_request_is_admitted_until_one_ends() -> None:
    async def ask() -> None:
        async with gateway(Handle(None), max_in_flight=1) as made:
            made.admit()
            with pytest.raises(ApiError) as caught:
                made.admit()
            assert (caught.value.code, caught.value.type) == (503, "overloaded")
            made.leave()
            made.admit()

    asyncio.run(ask())
