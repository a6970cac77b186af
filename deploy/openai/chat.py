"""`POST /v1/chat/completions`: one image and a text in, completions out, whole or in pieces."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from typing import Any, Literal

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from blip2_actor import Completion
from deploy.guard.cost import cost_of
from deploy.http.answers import Answer, confidence_of, fingerprint
from deploy.http.errors import ApiError
from deploy.http.event_stream import EVENTS, Emit, EventStream, event
from deploy.http.images import ImageSource, read_texts
from deploy.http.openapi import answer_in, body_of, errors
from deploy.http.request_body import read_body
from deploy.http.served_model import ServedModel
from deploy.openai.chat_request import ChatBody, content_of
from deploy.service import Service
from deploy.work import ImageOutputs, ImageWork, TextPiece, TextToGenerate


class Usage(Answer):
    prompt_tokens: int
    """Tokens of the text and queries of the image."""
    completion_tokens: int
    total_tokens: int


class ChatMessage(Answer):
    role: Literal["assistant"]
    content: str
    refusal: None


class TokenLogprob(Answer):
    token: str
    """What the token adds to the text. A token that ends inside a character adds nothing, and the next one
    adds the whole character."""
    logprob: float
    bytes: list[int]
    """The same in UTF-8."""
    top_logprobs: list[None]
    """Always empty."""


class ChatLogprobs(Answer):
    content: list[TokenLogprob]
    """The tokens of the text, without the end token and what comes after a stop text."""
    refusal: None


class ChatChoice(Answer):
    index: int
    message: ChatMessage
    finish_reason: Literal["stop", "length"]
    logprobs: ChatLogprobs | None
    confidence: float | None
    """Probability that the text is right, as in the answers of /v1/caption; null for all but the first
    choice. OpenAI has no such field."""


class ChatCompletion(Answer):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class ChatDelta(Answer):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(Answer):
    index: int
    delta: ChatDelta
    finish_reason: Literal["stop", "length"] | None
    logprobs: ChatLogprobs | None
    confidence: float | None = None
    """As in a completion, in the last piece of each choice."""


class ChatCompletionChunk(Answer):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


def chat_router(service: Service) -> APIRouter:
    """Return the route of chat completions."""
    router = APIRouter(tags=["OpenAI"], responses=errors())

    @router.post(
        "/v1/chat/completions",
        openapi_extra=body_of(ChatBody),
        responses=answer_in((EVENTS,), ChatCompletionChunk),
        response_model=ChatCompletion,
    )
    async def chat_completions(request: Request) -> Response:
        """Continue a text about an image, or caption it, as OpenAI's clients ask.

        The image is a data URI, or a URL of a host that the service allows. BLIP-2 reads one image and one
        text; everything else is refused by name.
        """
        body = await read_body(request, ChatBody, service.image_policy)
        body.check()
        if body.stream:
            return EventStream(lambda emit: _stream(service, body, emit), _error_event)
        async with _chat_of(service, body) as chat:
            return JSONResponse(await chat.complete())

    return router


@asynccontextmanager
async def _chat_of(service: Service, body: ChatBody) -> AsyncIterator[_Chat]:
    async with service.model(body.model) as model:
        prompt, url = content_of(body.messages)
        text = TextToGenerate(prompt=prompt, options=body.generation_options(model.options))
        [image] = await read_texts("image_url", [url], service.image_policy)
        yield _Chat(service, model, body, text, image)


async def _stream(service: Service, body: ChatBody, emit: Emit) -> None:
    async with _chat_of(service, body) as chat:
        await chat.stream(emit)


class _Chat:
    """One completion under way."""

    def __init__(
        self, service: Service, model: ServedModel, body: ChatBody, text: TextToGenerate, image: ImageSource
    ) -> None:
        self._service = service
        self._model = model
        self._text = text
        self._image = image
        self._wants_logprobs = bool(body.logprobs)
        self._wants_usage = body.stream_options is not None and body.stream_options.include_usage
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            **self._identity(),
        }

    def _identity(self, outputs: ImageOutputs | None = None) -> dict[str, str]:
        """Say which model answers."""
        model = self._model if outputs is None else self._model.made_by(outputs.model)
        by_default = TextToGenerate(prompt=None, options=model.options)
        return {"model": model.name, "system_fingerprint": fingerprint(model.info, by_default)}

    async def complete(self) -> dict[str, Any]:
        """Return a `ChatCompletion`."""
        service, work = self._service, self._work(self._text)
        async with service.admit(cost_of(work)):
            outputs = (await service.make(self._model, self._image, work, needs_tokens=True)).outputs
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": completion.text, "refusal": None},
                "finish_reason": completion.finish_reason,
                "logprobs": logprobs,
                "confidence": self._confidence(index, completion, outputs),
            }
            for index, (completion, logprobs) in enumerate(self._completions(outputs))
        ]
        usage = self._usage(outputs)
        head = self._head | self._identity(outputs)
        return head | {"object": "chat.completion", "choices": choices, "usage": usage}

    async def stream(self, emit: Emit) -> None:
        """Emit each `ChatCompletionChunk`."""
        service, work = self._service, self._work(*_one_by_one(self._text))
        sent: dict[int, int] = {}

        async def emit_text(index: int, text: str) -> None:
            if index not in sent:
                await emit(self._chunk([_delta(index, {"role": "assistant", "content": ""})]))
                sent[index] = 0
            if text:
                sent[index] += len(text)
                await emit(self._chunk([_delta(index, {"content": text})]))

        items = service.stream(self._model, self._image, work)
        async with service.admit(cost_of(work)), aclosing(items):
            async for item in items:
                if isinstance(item, TextPiece):
                    await emit_text(item.index, item.text)
                else:
                    outputs = item.outputs
        for index, (completion, logprobs) in enumerate(self._completions(outputs)):
            await emit_text(index, completion.text[sent.get(index, 0) :])
            end = _delta(index, {}, completion.finish_reason, logprobs)
            end["confidence"] = self._confidence(index, completion, outputs)
            await emit(self._chunk([end]))
        if self._wants_usage:
            await emit(self._chunk([], self._usage(outputs)))
        await emit(b"data: [DONE]\n\n")

    def _work(self, *texts: TextToGenerate) -> ImageWork:
        return ImageWork(texts=texts, token_texts=self._wants_logprobs)

    def _completions(self, outputs: ImageOutputs) -> list[tuple[Completion, dict[str, Any] | None]]:
        """Return each completion with its `ChatLogprobs`, which are None if they are not wanted."""
        completions = outputs.completions
        if not self._wants_logprobs:
            return [(completion, None) for completion in completions]
        return [
            (completion, {"content": _logprobs(completion, texts), "refusal": None})
            for completion, texts in zip(completions, outputs.token_texts, strict=True)
        ]

    def _confidence(self, index: int, completion: Completion, outputs: ImageOutputs) -> float | None:
        if index:  # a calibration is of best texts
            return None
        model = self._model.made_by(outputs.model)
        return confidence_of(model, self._text, completion.logprob, len(completion.token_ids))

    def _chunk(self, choices: list[dict[str, Any]], usage: Any = None) -> bytes:
        chunk = self._head | {"object": "chat.completion.chunk", "choices": choices}
        return event(chunk | {"usage": usage} if self._wants_usage else chunk)

    def _usage(self, outputs: ImageOutputs) -> dict[str, int]:
        prompt = self._model.info.num_queries + outputs.texts[0].num_prompt_tokens
        completion = sum(len(one.token_ids) for one in outputs.completions)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }


def _one_by_one(text: TextToGenerate) -> tuple[TextToGenerate, ...]:
    """Return several samples as texts of their own, which can be streamed; with the seeds of the engine.

    Those of beam search come from one search, and stay together.
    """
    options = text.options
    if not options.do_sample or options.num_beams > 1:
        return (text,)
    return tuple(
        replace(text, options=replace(options, num_return_sequences=1, seed=options.seed + index))
        for index in range(options.num_return_sequences)
    )


def _logprobs(completion: Completion, token_texts: Sequence[str]) -> list[dict[str, Any]]:
    """Return a `TokenLogprob` for each token of a text; joined, they are the text."""
    found: list[dict[str, Any]] = []
    num_left = len(completion.text)
    for text, logprob in zip(token_texts, completion.token_logprobs, strict=True):
        if not num_left:
            break
        text = text[:num_left]
        num_left -= len(text)
        found.append({"token": text, "logprob": logprob, "bytes": [*text.encode()], "top_logprobs": []})
    return found


def _delta(
    index: int, delta: dict[str, str], finish_reason: str | None = None, logprobs: Any = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "finish_reason": finish_reason, "logprobs": logprobs}


def _error_event(error: ApiError) -> bytes:
    return event(error.document)
