"""`POST /v1/batch`: decoded images of a batch job in, results out, behind everybody else's requests.

It has a lane of its own: what is sent here waits for no slot that another request could have, and no other
request waits for it or is refused because of it.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import asdict
from typing import Annotated

import numpy as np
from fastapi import APIRouter
from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import Response

from blip2_actor import ModelInfo, Result
from deploy.guard.cost import Cost
from deploy.http.errors import ApiError, bad_request
from deploy.http.event_stream import LINES, Emit, EventStream, line
from deploy.http.images import MAX_BODIES, MAX_IMAGES
from deploy.http.lanes import in_lane
from deploy.http.openapi import answer_in, body_of, errors
from deploy.http.options import parse_options
from deploy.http.request_body import read_body
from deploy.http.service import ServedModel, Service
from deploy.http.wishes import Body, ModelName, Options
from deploy.work import TextOfBatch, TextToGenerate

MAX_TEXTS = 256
PULSE_S = 1.0
"""An empty line says after this many seconds without a result that the request is still served."""


class BatchText(Body):
    """One text to generate."""

    image: Annotated[int, Field(ge=0)] = 0
    """Which of the images."""
    prompt: str | None = None
    """Text that the answer continues; without one, the image is described."""


class BatchBody(Body):
    """Decoded images, and the texts to generate for them."""

    model: ModelName | None = None
    """One of `/v1/models`; without one, the first of them."""
    pixels: bytes
    """A file of NumPy's format .npy: uint8[N, S, S, 3], where S is the image size of the model."""
    texts: Annotated[list[BatchText], Field(min_length=1, max_length=MAX_TEXTS)]
    options: Options | None = None
    """Generation options; what is left out takes the value of the service."""
    digest: str | None = None
    """What `/v1/model` must say for the request to be served, if it is given."""
    dtype: str | None = None
    """As `digest`, with which it is compared."""
    quantize: str | None = None
    """As `dtype`."""

    def require_model(self, model: ModelInfo) -> None:
        """Raise ApiError 409 unless the service has the model that the job is for."""
        if self.digest is None:
            return
        names = ("digest", "dtype", "quantize")
        wrong = [name for name in names if getattr(self, name) != getattr(model, name)]
        if wrong:
            raise ApiError(409, "wrong_model", f"the model of the service has another {', '.join(wrong)}")


class BatchCompletion(BaseModel):
    text: str
    token_ids: list[int]
    logprob: float
    finish_reason: str
    token_logprobs: list[float]


class BatchLine(BaseModel):
    """One text, in the order in which they are finished."""

    index: int
    """Position in `texts`."""
    status: str
    error: str | None
    num_prompt_tokens: int
    completions: list[BatchCompletion]


class BrokenOff(BaseModel):
    """The last line of an answer that lacks some texts; they can be asked for again."""

    status: str
    error: str


def batch_router(service: Service) -> APIRouter:
    """Return the route for batch jobs."""
    router = APIRouter(tags=["batch"], responses=errors())

    @router.post(
        "/v1/batch",
        openapi_extra=body_of(BatchBody, forms=True),
        responses={**answer_in((LINES,), BatchLine, BrokenOff), **errors(403, 409)},
        response_class=Response,
    )
    async def batch(request: Request) -> Response:
        """Generate texts for decoded images at low priority; each answer comes as soon as it is finished.

        The body is a form. An empty line says that the request is still served.
        """
        body = await read_body(request, BatchBody, service.image_policy, MAX_BODIES)
        model = await service.model(body.model)
        body.require_model(model.info)
        options = parse_options(body.options, model.options)
        size_px = model.info.image_size_px
        images = await in_lane(len(body.pixels), lambda: _read_images(body.pixels, size_px))
        if any(text.image >= len(images) for text in body.texts):
            raise bad_request(f"texts: image must be below the number of images, {len(images)}")
        texts = [
            TextOfBatch(image=text.image, text=TextToGenerate(prompt=text.prompt or None, options=options))
            for text in body.texts
        ]
        slots = len(texts) * max(options.num_beams, options.num_return_sequences)
        cost = Cost(slots=slots, steps=options.max_new_tokens)
        return EventStream(
            lambda emit: _generate(service, model, images, texts, cost, emit),
            lambda error: line({"status": error.type, "error": error.message}),
            LINES,
        )

    return router


async def _generate(
    service: Service,
    model: ServedModel,
    images: np.ndarray,
    texts: Sequence[TextOfBatch],
    cost: Cost,
    emit: Emit,
) -> None:
    async with service.admit_batch(cost) as check_open:
        await emit(b"\n")  # it is admitted
        async with (
            aclosing(service.run_batch(model, images, texts)) as finished,
            aclosing(_with_pulse(finished)) as pulse,
        ):
            async for results in pulse:
                check_open()
                await emit(b"".join(_line(index, result) for index, result in results) or b"\n")


async def _with_pulse(
    finished: AsyncGenerator[list[tuple[int, Result]], None],
) -> AsyncGenerator[list[tuple[int, Result]], None]:
    """Yield what an iterator yields, and an empty list after each second without anything."""
    following = asyncio.ensure_future(anext(finished))
    try:
        while True:
            done, _ = await asyncio.wait({following}, timeout=PULSE_S)
            if not done:
                yield []
                continue
            try:
                yield following.result()
            except StopAsyncIteration:
                return
            following = asyncio.ensure_future(anext(finished))
    finally:
        following.cancel()
        await asyncio.wait({following})


def _line(index: int, result: Result) -> bytes:
    completions = [asdict(completion) for completion in result.completions]
    head = {"index": index, "status": result.status.value, "error": result.error}
    return line(head | {"num_prompt_tokens": result.num_prompt_tokens, "completions": completions})


def _read_images(file: bytes, size_px: int) -> np.ndarray:
    """Return uint8[N, S, S, 3]; raise ApiError 400 for anything else."""
    try:
        images: np.ndarray = np.load(io.BytesIO(file), allow_pickle=False)
        kind = f"{images.dtype}{list(images.shape)}"
    except Exception:  # NumPy raises errors of many classes for what is not in its format
        raise bad_request("pixels must be a file of NumPy's format .npy") from None
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (size_px, size_px, 3):
        raise bad_request(f"pixels must be uint8[N, {size_px}, {size_px}, 3], got {kind}")
    if not 1 <= len(images) <= MAX_IMAGES:
        raise bad_request(f"pixels must be from 1 to {MAX_IMAGES} images, got {len(images)}")
    return images
