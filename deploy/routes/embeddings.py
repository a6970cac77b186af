"""`POST /v1/embed`: vectors of an image or of texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse

from deploy.guard.cost import cost_of
from deploy.http.answers import Answer, Vector, vectors_of
from deploy.http.errors import bad_request
from deploy.http.images import ImageField, ImageSource
from deploy.http.openapi import body_of, errors
from deploy.http.request_body import read_body
from deploy.http.served_model import ServedModel
from deploy.http.wishes import (
    MAX_TEXTS,
    Body,
    EmbeddingKind,
    EmbeddingKinds,
    ModelName,
    Text,
    require_matching,
)
from deploy.service import Service
from deploy.work import ImageWork


class EmbedBody(Body):
    """An image, or texts."""

    model: ModelName | None = None
    """One of `/v1/models`; without one, the first of them."""
    image: ImageField | None = None
    embed: Annotated[EmbeddingKinds, Field(min_length=1)] = Field(default=["qformer"])
    """Vectors of the image: vision (pooled), qformer (the mean of the queries), queries (each of them), and
    contrastive, which needs a retrieval model."""
    texts: Annotated[list[Text], Field(min_length=1, max_length=MAX_TEXTS)] | None = None
    """Texts, embedded by the retrieval model."""


class EmbedAnswer(Answer):
    """Vectors of an image by kind, or of texts in order."""

    embeddings: dict[str, Vector | list[Vector]] | list[Vector]
    """For an image, the vectors by kind; for texts, one unit vector each."""
    width: int | None = None
    height: int | None = None
    sha256: str | None = None
    """SHA-256 of the encoded image, in hexadecimal."""
    model: str


def embeddings_router(service: Service) -> APIRouter:
    """Return the route that embeds."""
    router = APIRouter(tags=["embeddings"], responses=errors())

    @router.post(
        "/v1/embed", openapi_extra=body_of(EmbedBody, forms=True, raw=True), response_model=EmbedAnswer
    )
    async def embed(request: Request) -> JSONResponse:
        """Embed an image, or texts with a retrieval model.

        The contrastive vectors of an image and of a text are comparable: the largest of their dot products
        is the cosine that `/v1/match` calls itc.
        """
        body = await read_body(request, EmbedBody, service.image_policy)
        if (body.image is None) == (body.texts is None):
            raise bad_request("image or texts must be given, one of them")
        if body.texts is not None and "embed" in body.model_fields_set:
            raise bad_request("embed must be left out with texts, whose vectors are of one kind")
        async with service.model(body.model) as model:
            if body.image is None:
                return JSONResponse(await _embed_texts(service, model, body.texts or []))
            return JSONResponse(await _embed_image(service, model, body.image, body.embed))

    return router


async def _embed_texts(service: Service, model: ServedModel, texts: list[str]) -> dict[str, Any]:
    require_matching(model, "texts")
    assert model.matching is not None
    async with service.admit(cost_of(ImageWork())):
        found = await service.embed_texts(texts)
    vectors = [embedding.vectors[0].tolist() for embedding in found if embedding.vectors is not None]
    return {"embeddings": vectors, "model": model.matching.model}


async def _embed_image(
    service: Service, model: ServedModel, image: ImageSource, kinds: Sequence[EmbeddingKind]
) -> dict[str, Any]:
    if "contrastive" in kinds:
        require_matching(model, "embed")
    work = ImageWork(
        features=any(kind != "contrastive" for kind in kinds), contrastive="contrastive" in kinds
    )
    [made] = await service.make_each(model, [image], work)
    return {
        "embeddings": vectors_of(kinds, made.outputs.features, made.outputs.contrastive),
        "width": made.image.width,
        "height": made.image.height,
        "sha256": made.sha256,
        "model": model.name,
    }
