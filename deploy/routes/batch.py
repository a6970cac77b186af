"""`POST /v1/batch`: decoded images of a batch job in, results out, behind everybody else's requests.

It has a lane of its own: what is sent here waits for no slot that another request could have, and no other
request waits for it or is refused because of it, unless it waits for the engines of its model to start.
"""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import asdict
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter
from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import Response

from blip2_actor import GenerationOptions, ModelInfo, Result, Score
from deploy.guard.cost import Cost
from deploy.http.errors import ApiError, bad_request
from deploy.http.event_stream import LINES, Emit, EventStream, line
from deploy.http.images import MAX_BODIES, MAX_IMAGES
from deploy.http.lanes import in_lane
from deploy.http.openapi import answer_in, body_of, errors
from deploy.http.options import parse_options
from deploy.http.request_body import read_body
from deploy.http.served_model import ServedModel
from deploy.http.wishes import Body, ModelName, Options
from deploy.service import Service
from deploy.work import (
    BatchOutcome,
    BatchWork,
    ScoreOfBatch,
    TextOfBatch,
    TextToGenerate,
    TextToScore,
)

MAX_ASKED = 256
"""Texts, scores and features of one request together."""
MAX_BATCH_CHARS = 1 << 20
"""Of all prompts and texts of one request. While an engine makes tokens of them, all others wait: 12 s of
8 MB."""
PULSE_S = 1.0
"""An empty line says after this many seconds without a result that the request is still served."""


class BatchText(Body):
    """One text to generate."""

    image: Annotated[int, Field(ge=0)] = 0
    """Which of the images."""
    prompt: str | None = None
    """Text that the answer continues; without one, the image is described."""


class BatchScore(Body):
    """One text to score."""

    image: Annotated[int, Field(ge=0)] = 0
    """Which of the images."""
    text: str
    """Text whose probability after the image and the prompt is wanted."""
    prompt: str | None = None
    """What stands before the text."""


class BatchBody(Body):
    """Decoded images, and what is made of them: texts, scores of given texts, and features."""

    model: ModelName | None = None
    """One of `/v1/models`; without one, the first of them."""
    pixels: bytes
    """A file of NumPy's format .npy: uint8[N, S, S, 3], where S is the image size of the model."""
    texts: list[BatchText] = Field(default_factory=list)
    """Texts to generate, such as [{"image": 0, "prompt": "a photo of"}]; both may be left out."""
    scores: list[BatchScore] = Field(default_factory=list)
    """Texts to score, such as [{"image": 0, "text": "a dog", "prompt": "a photo of"}]."""
    features: list[Annotated[int, Field(ge=0)]] = Field(default_factory=list)
    """Images of which the outputs of the vision encoder and the Q-Former are wanted."""
    options: Options | None = None
    """Generation options; what is left out takes the value of the service."""
    digest: str | None = None
    """What `/v1/model` must say for the request to be served, if it is given."""
    dtype: str | None = None
    """As `digest`, with which it is compared."""
    quantize: str | None = None
    """As `dtype`."""

    def work(self, num_images: int, options: GenerationOptions) -> BatchWork:
        """Return what is asked; raise ApiError 400 if it is nothing, too much, or of an unknown image."""
        images_of = {
            "texts": [one.image for one in self.texts],
            "scores": [one.image for one in self.scores],
            "features": self.features,
        }
        num_asked = sum(map(len, images_of.values()))
        if not 1 <= num_asked <= MAX_ASKED:
            raise bad_request(
                f"texts, scores and features must be from 1 to {MAX_ASKED} together, got {num_asked}"
            )
        prompts = [one.prompt or "" for one in self.texts] + [one.prompt or "" for one in self.scores]
        num_chars = sum(map(len, prompts)) + sum(len(one.text) for one in self.scores)
        if num_chars > MAX_BATCH_CHARS:
            # Not 413, after which a job would make all of its requests smaller for one long text.
            raise bad_request(
                f"prompts and texts must have at most {MAX_BATCH_CHARS} characters together, got {num_chars}"
            )
        for name, images in images_of.items():
            if any(image >= num_images for image in images):
                raise bad_request(f"{name}: image must be below the number of images, {num_images}")
        texts = [TextToGenerate(prompt=one.prompt or None, options=options) for one in self.texts]
        scores = [TextToScore(text=one.text, prompt=one.prompt or None) for one in self.scores]
        return BatchWork(
            texts=tuple(map(TextOfBatch, images_of["texts"], texts)),
            scores=tuple(map(ScoreOfBatch, images_of["scores"], scores)),
            features=tuple(self.features),
        )

    def require_model(self, model: ModelInfo) -> None:
        """Raise ApiError 409 unless the service has the model that the job is for, 400 without its digest."""
        if self.digest is None:
            if self.dtype is not None or self.quantize is not None:
                raise bad_request("dtype and quantize must be left out without digest")
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
    """One text; lines come in the order in which they are finished."""

    index: int
    """Position in `texts`."""
    status: str
    error: str | None
    num_prompt_tokens: int
    completions: list[BatchCompletion]


class BatchScoreLine(BaseModel):
    """One score."""

    index: int
    """Number of `texts`, plus position in `scores`."""
    status: str
    error: str | None
    logprob: float | None
    """Sum of the log-probabilities of the tokens, natural log."""
    num_tokens: int


class BatchFeaturesLine(BaseModel):
    """The features of one image; null unless the status is ok."""

    index: int
    """Number of `texts` and `scores`, plus position in `features`."""
    status: str
    error: str | None
    qformer_features: str | None
    """float32[Q, Dq], a file of NumPy's format .npy, in base64."""
    pooler_output: str | None
    """float32[Dv], as above."""


class BrokenOff(BaseModel):
    """The last line of an answer that lacks some parts; they can be asked for again."""

    status: str
    error: str


def batch_router(service: Service) -> APIRouter:
    """Return the route for batch jobs."""
    router = APIRouter(tags=["batch"], responses=errors())

    @router.post(
        "/v1/batch",
        openapi_extra=body_of(BatchBody, forms=True, json=False),
        responses={
            **answer_in((LINES,), BatchLine, BatchScoreLine, BatchFeaturesLine, BrokenOff),
            **errors(409),
        },
        response_class=Response,
    )
    async def batch(request: Request) -> Response:
        """Work on decoded images at low priority; each part of the answer comes as soon as it is finished.

        The body is a form. An empty line says that the request is still served.
        """
        body = await read_body(request, BatchBody, service.image_policy, MAX_BODIES, takes_json=False)
        async with service.model(body.model) as model:
            body.require_model(model.info)
        options = parse_options(body.options, model.options)
        size_px = model.info.image_size_px
        images = await in_lane(len(body.pixels), lambda: _read_images(body.pixels, size_px))
        work = body.work(len(images), options)
        slots_of_text = max(options.num_beams, options.num_return_sequences)
        num_read = len(work) - len(work.texts)
        cost = Cost(
            slots=len(work.texts) * slots_of_text + num_read,
            steps=options.max_new_tokens if work.texts else 1,
        )
        return EventStream(
            lambda emit: _serve(service, model, images, work, cost, emit),
            lambda error: line({"status": error.type, "error": error.message}),
            LINES,
        )

    return router


async def _serve(
    service: Service,
    model: ServedModel,
    images: np.ndarray,
    work: BatchWork,
    cost: Cost,
    emit: Emit,
) -> None:
    async with service.admit_batch(cost) as check_open:
        await emit(b"\n")  # it is admitted
        async with (
            aclosing(service.run_batch(model, images, work)) as finished,
            aclosing(_with_pulse(finished)) as pulse,
        ):
            async for outcomes in pulse:
                check_open()
                await emit(b"".join(_line(index, outcome) for index, outcome in outcomes) or b"\n")


async def _with_pulse(
    finished: AsyncGenerator[list[tuple[int, BatchOutcome]], None],
) -> AsyncGenerator[list[tuple[int, BatchOutcome]], None]:
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


def _line(index: int, outcome: BatchOutcome) -> bytes:
    found: dict[str, Any] = {"index": index, "status": outcome.status.value, "error": outcome.error}
    if isinstance(outcome, Result):
        found["num_prompt_tokens"] = outcome.num_prompt_tokens
        found["completions"] = [asdict(completion) for completion in outcome.completions]
    elif isinstance(outcome, Score):
        found |= {"logprob": outcome.logprob, "num_tokens": outcome.num_tokens}
    else:
        found["qformer_features"] = _base64_of(outcome.qformer_features)
        found["pooler_output"] = _base64_of(outcome.pooler_output)
    return line(found)


def _base64_of(vectors: np.ndarray | None) -> str | None:
    if vectors is None:
        return None
    file = io.BytesIO()
    np.save(file, vectors)
    return base64.b64encode(file.getvalue()).decode()


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
