"""`GET /v1/models`: the one model of the service."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter
from starlette.responses import JSONResponse

from deploy.http.answers import Answer
from deploy.http.openapi import errors
from deploy.http.service import Service
from deploy.openai.chat_request import require_model


class Model(Answer):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class Models(Answer):
    object: Literal["list"]
    data: list[Model]


def models_router(service: Service) -> APIRouter:
    """Return the routes that list the model."""
    router = APIRouter(tags=["OpenAI"])

    def describe() -> dict[str, Any]:
        return {"id": service.model.model, "object": "model", "created": 0, "owned_by": "blip2"}

    @router.get("/v1/models", response_model=Models)
    async def models() -> JSONResponse:
        """List the model."""
        return JSONResponse({"object": "list", "data": [describe()]})

    @router.get("/v1/models/{name:path}", response_model=Model, responses=errors(404))
    async def model(name: str) -> JSONResponse:
        """Describe the model, if it has this name."""
        require_model(service, name)
        return JSONResponse(describe())

    return router
