"""`POST /v1/score`, `/v1/match` and `/v1/rerank`: how well texts and images fit."""

from __future__ import annotations

import math
import re
from typing import Annotated, Literal

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse

from deploy.http.answers import Answer, MatchAnswer, ScoreAnswer, match_answers, score_answers
from deploy.http.errors import bad_request
from deploy.http.images import MAX_BODIES, MAX_IMAGES, ImageField, ImageSource, read_text
from deploy.http.lanes import in_lane
from deploy.http.openapi import body_of, errors
from deploy.http.request_body import read_body
from deploy.http.served_model import ServedModel
from deploy.http.wishes import MAX_TEXT_CHARS, MAX_TEXTS, Body, ModelName, Text, require_matching
from deploy.service import Service
from deploy.work import ImageWork, TextToScore

_IMAGE_IN_BASE64 = re.compile(r"(/9j/|iVBORw0KGgo|R0lGOD|UklGR)[\w+/\r\n]{64,}={0,2}", re.ASCII)
"""How JPEG, PNG, GIF and WebP begin. No text for an image is written like this."""

MAX_PLAIN_CHARS = 64 << 20
"""Of a string that may be an image as a data URI, whose size has a limit of its own."""

SomeTexts = Annotated[list[Text], Field(min_length=1, max_length=MAX_TEXTS)]


class ScoreBody(Body):
    """Texts to score after one image."""

    model: ModelName | None = None
    """One of `/v1/models`; without one, the first of them."""
    image: ImageField
    texts: SomeTexts
    """Texts whose log-probability after the image and the prompt is wanted."""
    prompt: Text | None = None
    """What stands before each text."""


class MatchBody(Body):
    """Texts to compare with one image."""

    model: ModelName | None = None
    """One of `/v1/models` that has a retrieval model; without one, the first of them."""
    image: ImageField
    texts: SomeTexts
    """Texts to compare with the image."""


class RankedImage(Body):
    """An image among texts."""

    image: str
    """In base64, a data URI, or a URL of a host that the service allows."""


class RankedText(Body):
    text: Text


Part = Annotated[str, Field(max_length=MAX_PLAIN_CHARS)] | RankedText | RankedImage
"""A text, or an image; a plain string that starts with `data:image/` is an image too. One that is an image in
base64 alone is refused: as a text it would be ranked without a hint."""


class RerankBody(Body):
    """An image and texts to rank, or a text and images to rank."""

    query: Part
    """What the others are compared with."""
    documents: Annotated[list[Part], Field(min_length=1, max_length=MAX_TEXTS)]
    """What is ranked: texts if the query is an image, images if it is a text."""
    top_n: Annotated[int, Field(ge=1)] | None = None
    """How many of the best are returned; all by default."""
    return_documents: bool = False
    """Whether the texts are returned with their scores; images never are."""
    model: ModelName | None = None
    """One of `/v1/models`; without one, the first of them."""

    @property
    def num_chars(self) -> int:
        """Length of texts and images as they are written."""
        return sum(len(_written(part)) for part in (self.query, *self.documents))

    def contents(self, service: Service) -> tuple[str | ImageSource, list[str | ImageSource]]:
        """Return the query and the documents, each a text or an image; raise ApiError 400 or 413."""
        documents = [_content(service, f"documents.{i}", part) for i, part in enumerate(self.documents)]
        return _content(service, "query", self.query), documents


class ScoresAnswer(Answer):
    scores: list[ScoreAnswer]
    model: str


class MatchesAnswer(Answer):
    matches: list[MatchAnswer]
    model: str


class Ranked(Answer):
    index: int
    """Position in `documents`."""
    relevance_score: float
    """From 0 to 1: the probability of a match by the retrieval model; without one, the mean probability of a
    token of the text after the image."""
    document: RankedText | None = None


class RerankAnswer(Answer):
    results: list[Ranked]
    """The best first."""
    scored_by: Literal["itm", "likelihood"]
    model: str


def scores_router(service: Service) -> APIRouter:
    """Return the routes that compare images with texts."""
    router = APIRouter(tags=["scores"], responses=errors())

    @router.post(
        "/v1/score", openapi_extra=body_of(ScoreBody, forms=True, raw=True), response_model=ScoresAnswer
    )
    async def score(request: Request) -> JSONResponse:
        """Return the log-probability of texts after an image and a prompt."""
        body = await read_body(request, ScoreBody, service.image_policy)
        scores = tuple(TextToScore(text=text, prompt=body.prompt or None) for text in body.texts)
        async with service.model(body.model) as model:
            [made] = await service.make_each(model, [body.image], ImageWork(scores=scores))
        answer = score_answers(body.texts, made.outputs.scores)
        return JSONResponse({"scores": answer, "model": model.name})

    @router.post(
        "/v1/match", openapi_extra=body_of(MatchBody, forms=True, raw=True), response_model=MatchesAnswer
    )
    async def match(request: Request) -> JSONResponse:
        """Return whether texts describe an image (ITM) and how close they are to it (ITC).

        This needs a retrieval model (--score-model).
        """
        body = await read_body(request, MatchBody, service.image_policy)
        async with service.model(body.model) as model:
            require_matching(model, "match")
            [made] = await service.make_each(model, [body.image], ImageWork(matches=tuple(body.texts)))
        assert model.matching is not None
        answer = match_answers(body.texts, made.outputs.matches)
        return JSONResponse({"matches": answer, "model": model.matching.model})

    @router.post("/v1/rerank", openapi_extra=body_of(RerankBody), response_model=RerankAnswer)
    async def rerank(request: Request) -> JSONResponse:
        """Rank texts for an image, or images for a text, the best first."""
        body = await read_body(request, RerankBody, service.image_policy, MAX_BODIES)
        async with service.model(body.model) as model:
            query, documents = await in_lane(body.num_chars, lambda: body.contents(service))
            relevance = await _relevance(service, model, query, documents)
        order = sorted(range(len(relevance)), key=lambda index: -relevance[index])[: body.top_n]
        results = [{"index": index, "relevance_score": relevance[index]} for index in order]
        if body.return_documents:
            for result, index in zip(results, order, strict=True):
                if isinstance(text := documents[index], str):
                    result["document"] = {"text": text}  # type: ignore[assignment]
        scored_by = "likelihood" if model.matching is None else "itm"
        name = model.name if model.matching is None else model.matching.model
        return JSONResponse({"results": results, "scored_by": scored_by, "model": name})

    return router


def _written(part: str | RankedText | RankedImage) -> str:
    if isinstance(part, str):
        return part
    return part.text if isinstance(part, RankedText) else part.image


def _content(service: Service, name: str, part: str | RankedText | RankedImage) -> str | ImageSource:
    """Return a text, or an image."""
    if isinstance(part, RankedText):
        return part.text
    if isinstance(part, str) and not part.startswith("data:image/"):
        if _IMAGE_IN_BASE64.fullmatch(part.strip()):
            raise bad_request(f'{name} is an image in base64 as a plain text; pass {{"image": "..."}}')
        if len(part) > MAX_TEXT_CHARS:
            raise bad_request(f"{name} must have at most {MAX_TEXT_CHARS} characters, got {len(part)}")
        return part
    return read_text(name, _written(part), service.image_policy)


async def _relevance(
    service: Service, model: ServedModel, query: str | ImageSource, documents: list[str | ImageSource]
) -> list[float]:
    texts = [part for part in (query, *documents) if isinstance(part, str)]
    images = [part for part in (query, *documents) if not isinstance(part, str)]
    if len(images) > MAX_IMAGES:
        raise bad_request(f"documents must be at most {MAX_IMAGES} images, got {len(images)}")
    if any(isinstance(document, str) == isinstance(query, str) for document in documents):
        raise bad_request("documents must be texts if query is an image, and images if query is a text")
    if model.matching is None:
        work = ImageWork(scores=tuple(TextToScore(text=text) for text in texts))
    else:
        work = ImageWork(matches=tuple(texts))
    outputs = [made.outputs for made in await service.make_each(model, images, work, "documents")]
    likelihoods = [math.exp(-(score.loss or 0.0)) for output in outputs for score in output.scores]
    return likelihoods or [match.itm or 0.0 for output in outputs for match in output.matches]
