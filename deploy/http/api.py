"""The HTTP interface: routes, the shape of answers, and a page to try it.

It imports no Ray. `create_api` takes any service that can caption a call, so that tests need no cluster.
"""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from blip2_actor import GenerationOptions, ModelInfo, Result
from deploy.guard.cost import Cost, cost_of
from deploy.http.errors import ApiError
from deploy.http.request_body import FIELDS, CaptionCall, read_call
from deploy.http.scene import draw_scene_png

PAGE = Path(__file__).with_name("page.html")
PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src blob:; connect-src 'self'; form-action 'none'; frame-ancestors 'none'"
)


class CaptionService(Protocol):
    """What the routes need of the object that captions."""

    model: ModelInfo
    options: GenerationOptions
    max_image_bytes: int

    def admit(self, cost: Cost) -> AbstractAsyncContextManager[None]:
        """Hold what a request costs while the block runs, and end the block when its time is over.

        Raises:
            ApiError: 503 when too much is being served, 429 when this caller has too much in flight, 504
                when the time is over.
        """
        ...

    async def caption(self, call: CaptionCall) -> tuple[Result, int | None, int | None]:
        """Return an ok result, and the width and height of the original image; or raise ApiError."""
        ...

    async def check_ready(self) -> None:
        """Raise ApiError 503 unless an engine can caption now."""
        ...


def create_api(service: CaptionService) -> FastAPI:
    """Return the application whose routes call a service."""
    api = FastAPI(
        title="BLIP-2", description="Captions and answers for images.", version="1", redirect_slashes=False
    )
    api.add_exception_handler(ApiError, _answer_api_error)
    api.add_exception_handler(HTTPException, _answer_http_exception)
    api.add_exception_handler(Exception, _answer_anything_else)

    @api.post("/v1/caption", openapi_extra=_caption_body())
    async def caption(request: Request) -> JSONResponse:
        """Caption one image, or continue a prompt about it."""
        call = await read_call(request, service.options, service.max_image_bytes)
        async with service.admit(cost_of(call.options, num_image_bytes=len(call.image))):
            result, width, height = await service.caption(call)
        return JSONResponse(_caption_answer(result, width, height, service.model.model))

    @api.get("/v1/model")
    async def model() -> JSONResponse:
        """Describe the model, and the options of a request that names none."""
        return JSONResponse(asdict(service.model) | {"options": asdict(service.options)})

    @api.get("/healthz")
    async def healthz() -> JSONResponse:
        """Answer 200 when an engine can caption now, else 503."""
        await service.check_ready()
        return JSONResponse({"status": "ok"})

    @api.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(
            PAGE.read_text(encoding="utf-8"), headers={"Content-Security-Policy": PAGE_POLICY}
        )

    @api.get("/scene.png", include_in_schema=False)
    def scene() -> Response:
        """Draw a picture that the demonstration model can caption; other models have no such route."""
        if service.model.model != "demo":
            raise HTTPException(404)
        png, caption = draw_scene_png()
        return Response(png, media_type="image/png", headers={"X-Caption": caption})

    return api


def _caption_answer(result: Result, width: int | None, height: int | None, model: str) -> dict[str, Any]:
    """Return the columns of the batch job's output, under the same names."""
    several = len(result.completions) > 1
    return {
        "caption": result.text,
        "captions": [completion.text for completion in result.completions] if several else None,
        "logprobs": [completion.logprob for completion in result.completions] if several else None,
        "logprob": result.logprob,
        "num_tokens": len(result.token_ids),
        "finish_reason": result.finish_reason,
        "status": result.status.value,
        "width": width,
        "height": height,
        "model": model,
    }


def _caption_body() -> dict[str, Any]:
    """Return the OpenAPI description of the body, which FastAPI cannot see: the route reads it itself."""
    image, prompt, options = FIELDS
    text = {"type": "string"}
    form = {image: {"type": "string", "format": "binary"}, prompt: text, options: text}
    document = {image: {"type": "string", "format": "byte"}, prompt: text, options: {"type": "object"}}
    content = {
        media: {"schema": {"type": "object", "required": [image], "properties": properties}}
        for media, properties in (("multipart/form-data", form), ("application/json", document))
    }
    return {"requestBody": {"required": True, "content": content}}


async def _answer_api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _answer_http_exception(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    kind = str(error.detail).lower().replace(" ", "_")
    response = ApiError(error.status_code, kind, str(error.detail)).response()
    response.headers.update(error.headers or {})
    return response


async def _answer_anything_else(_: Request, error: Exception) -> Response:
    # The middleware around this handler raises the error again, into the replica's log.
    return ApiError(500, "internal", "the service failed on this request; its log has the reason").response()
