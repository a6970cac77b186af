"""`POST /v1/embeddings`: vectors of images, as OpenAI's clients and those of vLLM ask for them.

A vector is the mean of the Q-Former's queries, as `qformer` of `/v1/embed`.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse

from deploy.http.answers import Answer, vector_of
from deploy.http.errors import bad_request
from deploy.http.images import MAX_BODIES, MAX_IMAGES, read_texts
from deploy.http.openapi import body_of, errors
from deploy.http.request_body import read_body
from deploy.http.wishes import Body
from deploy.openai.chat_request import Message, content_of
from deploy.service import Service
from deploy.work import ImageWork

Inputs = Annotated[list[str], Field(min_length=1, max_length=MAX_IMAGES)]


class EmbeddingsBody(Body):
    """Images as `input`, each a data URI or a URL, or one image in `messages`, as vLLM documents it."""

    model: str
    input: str | Inputs | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    encoding_format: Literal["float", "base64"] = "float"
    """base64 is that of float32, little-endian."""
    user: str | None = None
    """Accepted, without effect."""

    def urls(self) -> tuple[str, list[str]]:
        """Return the field with the images, and each as it is written; raise ApiError 400 for other texts."""
        if (self.input is None) == (self.messages is None):
            raise bad_request("input or messages must be given, one of them")
        if self.messages is not None:
            text, url = content_of(self.messages)
            if text is not None:
                raise bad_request("messages must contain an image alone; BLIP-2 embeds images without a text")
            return "image_url", [url]
        urls = [self.input] if isinstance(self.input, str) else self.input or []
        for url in urls:
            if not re.match(r"(data|https?):", url, re.IGNORECASE):
                raise bad_request(
                    "input must be images as data URIs or URLs: BLIP-2 embeds no texts here; a retrieval "
                    "model does, with /v1/embed"
                )
        return "input", urls


class OneEmbedding(Answer):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingsUsage(Answer):
    prompt_tokens: int
    """The queries of the images."""
    total_tokens: int


class Embeddings(Answer):
    object: Literal["list"]
    data: list[OneEmbedding]
    model: str
    usage: EmbeddingsUsage


def openai_embeddings_router(service: Service) -> APIRouter:
    """Return the route of embeddings."""
    router = APIRouter(tags=["OpenAI"], responses=errors())

    @router.post("/v1/embeddings", openapi_extra=body_of(EmbeddingsBody), response_model=Embeddings)
    async def embeddings(request: Request) -> JSONResponse:
        """Embed images with the Q-Former."""
        body = await read_body(request, EmbeddingsBody, service.image_policy, MAX_BODIES)
        async with service.model(body.model) as model:
            name, urls = body.urls()
            images = await read_texts(name, urls, service.image_policy)
            found = await service.make_each(model, images, ImageWork(features=True), name)
        vectors = [vector_of("qformer", made.outputs.features, None) for made in found]
        num_tokens = model.info.num_queries * len(images)
        answer = {
            "object": "list",
            "data": _data(vectors, body.encoding_format),
            "model": model.name,
            "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
        }
        return JSONResponse(answer)

    return router


def _data(vectors: Sequence[np.ndarray], encoding: str) -> list[dict[str, Any]]:
    return [
        {
            "object": "embedding",
            "index": index,
            "embedding": vector.tolist()
            if encoding == "float"
            else base64.b64encode(vector.astype("<f4").tobytes()).decode(),
        }
        for index, vector in enumerate(vectors)
    ]
