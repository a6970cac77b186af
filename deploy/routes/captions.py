"""`POST /v1/caption` for one image, `POST /v1/captions` for many: texts, scores and vectors."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from deploy.guard.cost import cost_of
from deploy.http.answers import CaptionAnswer, caption_answer
from deploy.http.errors import ApiError
from deploy.http.event_stream import EVENTS, LINES, Emit, EventStream, event, line
from deploy.http.images import MAX_BODIES, MAX_IMAGES, ImageField, ImageOrRefusal, ImageSource
from deploy.http.openapi import answer_in, body_of, errors
from deploy.http.request_body import read_body
from deploy.http.served_model import ServedModel
from deploy.http.wishes import CAPTION, Wishes
from deploy.service import Service
from deploy.work import ImageWork, TextPiece

AT_ONCE = 8
"""How many images of one request are decoded and captioned at the same time."""


class CaptionBody(Wishes):
    """One image, and what is asked of it."""

    image: ImageField
    stream: bool = False
    """Send the texts in pieces as they grow, as server-sent events."""


class CaptionsBody(Wishes):
    """Several images, and what is asked of each."""

    images: Annotated[list[ImageOrRefusal], Field(min_length=1, max_length=MAX_IMAGES)]
    """Each in base64, a data URI, or a URL of a host that the service allows; files in a form."""


class PieceOfText(BaseModel):
    """The event `text`: an output has grown. The pieces of an output join to its whole text."""

    output: str
    """`caption`, or the name of a prompt of `ask`."""
    text: str


class CaptionLine(CaptionAnswer):
    """One image of several, in the order in which they are finished."""

    index: int
    """Position of the image in the request."""


class FailedLine(BaseModel):
    """An image that has no caption."""

    index: int
    status: str
    error: str


def captions_router(service: Service) -> APIRouter:
    """Return the routes that caption."""
    router = APIRouter(tags=["captions"], responses=errors())

    @router.post(
        "/v1/caption",
        openapi_extra=body_of(CaptionBody, forms=True, raw=True),
        responses=answer_in((EVENTS,), PieceOfText, CaptionAnswer),
        response_model=CaptionAnswer,
    )
    async def caption(request: Request) -> Response:
        """Caption one image, answer questions about it, and score or embed it.

        The body is a form, JSON, or the image itself with everything else in the query.
        """
        body = await read_body(request, CaptionBody, service.image_policy)
        if not body.stream:
            return JSONResponse(await _caption(service, body))
        return EventStream(lambda emit: _stream(service, body, emit), _error_event)

    @router.post(
        "/v1/captions",
        openapi_extra=body_of(CaptionsBody, forms=True),
        responses=answer_in((LINES, EVENTS), CaptionLine, FailedLine),
        response_class=Response,
    )
    async def captions(request: Request) -> Response:
        """Caption several images; each answer comes as soon as it is finished, one JSON document per line.

        With `Accept: text/event-stream` the lines are the data of server-sent events.
        """
        body = await read_body(request, CaptionsBody, service.image_policy, MAX_BODIES)
        wants_events = EVENTS in request.headers.get("accept", "")
        encode = event if wants_events else line
        return EventStream(
            lambda emit: _caption_all(service, body, lambda answer: emit(encode(answer))),
            lambda error: encode({"status": error.type, "error": error.message}),
            EVENTS if wants_events else LINES,
        )

    return router


async def _caption(service: Service, body: CaptionBody) -> dict[str, Any]:
    async with service.model(body.model, may_be_on_trial=True) as model:
        work = body.work(model)  # what cannot be done is refused before anything is decoded
        async with service.admit(cost_of(work)):
            made = await service.make(model, body.image, work)
    return caption_answer(model, body, work, made)


async def _stream(service: Service, body: CaptionBody, emit: Emit) -> None:
    names = [CAPTION, *(body.ask or {})]
    async with service.model(body.model, may_be_on_trial=True) as model:
        work = body.work(model)
        items = service.stream(model, body.image, work)
        async with service.admit(cost_of(work)), aclosing(items):
            async for item in items:
                if isinstance(item, TextPiece):
                    await emit(event({"output": names[item.index], "text": item.text}, "text"))
                else:
                    await emit(event(caption_answer(model, body, work, item), "answer"))


async def _caption_all(
    service: Service, body: CaptionsBody, send: Callable[[dict[str, Any]], Awaitable[None]]
) -> None:
    """Caption every image; when the time of the request is over, it is over for those that are left."""
    unanswered = set(range(len(body.images)))

    async def answer(index: int, outcome: dict[str, Any] | ApiError) -> None:
        if isinstance(outcome, ApiError):
            outcome = {"status": outcome.type, "error": outcome.message}
        await send({"index": index} | outcome)
        unanswered.discard(index)  # not before: the time may be over while a client reads slowly

    try:
        async with service.model(body.model, may_be_on_trial=True) as model:
            work = body.work(model)
            async with service.serve(cost_of(work, num_images=len(body.images))):
                await _caption_each(service, model, body, work, answer)
    except ApiError as error:
        if len(unanswered) == len(body.images):
            raise
        for index in sorted(unanswered):
            await answer(index, error)


async def _caption_each(
    service: Service,
    model: ServedModel,
    body: CaptionsBody,
    work: ImageWork,
    answer: Callable[[int, dict[str, Any] | ApiError], Awaitable[None]],
) -> None:
    """Caption the images, a few at the same time; one that fails does not stop the others."""
    one_of_few = asyncio.Semaphore(AT_ONCE)

    async def caption(index: int, image: ImageSource | ApiError) -> None:
        async with one_of_few:
            try:
                if isinstance(image, ApiError):
                    raise image
                async with service.slots(cost_of(work)):
                    made = await service.make(model, image, work)
            except ApiError as error:
                await answer(index, error)
            else:
                await answer(index, caption_answer(model, body, work, made))

    async with asyncio.TaskGroup() as tasks:
        for index, image in enumerate(body.images):
            tasks.create_task(caption(index, image))


def _error_event(error: ApiError) -> bytes:
    return event(error.document, "error")
