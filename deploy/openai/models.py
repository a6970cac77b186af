"""`GET /v1/models`: the models of the service, by their names."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter
from starlette.responses import JSONResponse

from deploy.http.answers import Answer
from deploy.http.openapi import errors
from deploy.http.served_model import require_name
from deploy.service import Service


class Model(Answer):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class Models(Answer):
    object: Literal["list"]
    data: list[Model]


def models_router(service: Service) -> APIRouter:
    """Return the routes that list the models."""
    router = APIRouter(tags=["OpenAI"])

    def describe(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": 0, "owned_by": "blip2"}

    @router.get("/v1/models", response_model=Models, responses=errors(401))
    async def models() -> JSONResponse:
        """List the models; the first one answers requests that name none."""
        return JSONResponse({"object": "list", "data": [describe(name) for name in service.model_names]})

    @router.get("/v1/models/{name:path}", response_model=Model, responses=errors(401, 404))
    async def model(name: str) -> JSONResponse:
        """Describe the model of this name; its engines are not asked."""
        require_name(service.model_names, name)
        return JSONResponse(describe(name))

    return router
