"""The HTTP application: all routes, and the shape of errors."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Match

from deploy.http.errors import ApiError, shorten
from deploy.http.openapi import document
from deploy.observe.request_record import CLIENT_LEFT
from deploy.openai.chat import chat_router
from deploy.openai.embeddings import openai_embeddings_router
from deploy.openai.models import models_router
from deploy.routes.admin import admin_router
from deploy.routes.batch import batch_router
from deploy.routes.captions import captions_router
from deploy.routes.embeddings import embeddings_router
from deploy.routes.image_to_text import image_to_text_router
from deploy.routes.pages import pages_router
from deploy.routes.scores import scores_router
from deploy.service import Service

ROUTERS = (
    captions_router,
    batch_router,
    scores_router,
    embeddings_router,
    chat_router,
    openai_embeddings_router,
    models_router,
    image_to_text_router,
    pages_router,
    admin_router,
)


def create_api(service: Service) -> FastAPI:
    """Return the application whose routes call a service."""
    # FastAPI's own pages of documentation load scripts from elsewhere; `deploy.routes.pages` has one.
    api = FastAPI(
        title="BLIP-2",
        description="Captions, answers, scores and embeddings for images.",
        version="1",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        # FastAPI would begin a trace of its own; the spans of a request belong to Serve's.
        telemetry={"tracing": False},
    )
    for make_router in ROUTERS:
        api.include_router(make_router(service))
    document(api)
    api.add_exception_handler(ApiError, _answer_api_error)
    api.add_exception_handler(HTTPException, _answer_http_exception)
    api.add_exception_handler(ClientDisconnect, _answer_nobody)
    api.add_exception_handler(Exception, _answer_anything_else)
    return api


async def _answer_api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    """Answer for a path or a method that no route has; OPTIONS asks which methods the path has."""
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    if error.status_code == 405:
        headers["Allow"] = _allowed_methods(request)
        if request.method == "OPTIONS":
            return Response(status_code=204, headers=headers)
    kind, said = str(error.detail).lower().replace(" ", "_"), str(error.detail)
    path = shorten(request.url.path)
    if error.status_code == 404:
        said = f"there is no {path}; GET {request.scope.get('root_path', '')}/docs lists the routes"
    elif error.status_code == 405:
        said = f"{path} must be called with {headers['Allow']}, got {request.method}"
    return ApiError(error.status_code, kind, said, headers=headers).response()


def _allowed_methods(request: Request) -> str:
    """Return the methods of a path, over all of its routes. The front makes HEAD a GET."""
    routes = request.app.router.routes

    def has(method: str) -> bool:
        scope = {**request.scope, "method": method}
        return any(route.matches(scope)[0] is Match.FULL for route in routes)

    found = [name for method, name in (("GET", "GET, HEAD"), ("POST", "POST")) if has(method)]
    return ", ".join([*found, "OPTIONS"])


async def _answer_nobody(_: Request, __: Exception) -> Response:
    """End a request whose client has left before the end of its body, which is no failure."""
    return Response(status_code=CLIENT_LEFT)


async def _answer_anything_else(_: Request, error: Exception) -> Response:
    # The middleware around this handler raises the error again, into the replica's log.
    return ApiError(500, "internal", "the service failed on this request; its log has the reason").response()
