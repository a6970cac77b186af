"""What describes the service: the model, the health check, and pages for people."""

from __future__ import annotations

from dataclasses import asdict
from importlib.resources import files

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, Response

from deploy.http.answers import Answer
from deploy.http.openapi import errors
from deploy.http.scene import draw_scene_png
from deploy.http.service import Service

PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src blob:; connect-src 'self'; form-action 'none'; frame-ancestors 'none'"
)


class ModelAnswer(Answer):
    """The model, and what a request that names nothing gets."""

    model: str
    image_size_px: int
    dtype: str
    digest: str
    """Identifies the content of the checkpoint."""
    vision_width: int
    qformer_width: int
    num_queries: int
    options: dict[str, object]
    """Options of a request that names none."""
    score_model: str | None
    """The retrieval model, if the service has one."""


class HealthAnswer(Answer):
    status: str


def pages_router(service: Service) -> APIRouter:
    """Return the routes that only describe."""
    router = APIRouter(tags=["service"])

    @router.get("/v1/model", response_model=ModelAnswer)
    async def model() -> JSONResponse:
        """Describe the model, and the options of a request that names none."""
        score_model = None if service.matching is None else service.matching.model
        return JSONResponse(
            asdict(service.model) | {"options": asdict(service.options), "score_model": score_model}
        )

    @router.get("/healthz", response_model=HealthAnswer, responses=errors(503))
    @router.get("/readyz", response_model=HealthAnswer, responses=errors(503))
    async def readyz() -> JSONResponse:
        """Answer 200 when the service takes requests, also when many wait, else 503. Starts no engine."""
        await service.check_ready()
        return JSONResponse({"status": "ok"})

    @router.get("/startupz", response_model=HealthAnswer)
    async def startupz() -> JSONResponse:
        """Answer 200 once the service has started; before, the answer is 503."""
        return JSONResponse({"status": "ok"})

    @router.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return _page("page.html")

    @router.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return _page("docs.html")

    @router.get("/scene.png", include_in_schema=False)
    def scene() -> Response:
        """Draw a picture that the demonstration model can caption; other models have no such route."""
        if service.model.model != "demo":
            raise HTTPException(404)
        png, caption = draw_scene_png()
        return Response(png, media_type="image/png", headers={"X-Caption": caption})

    return router


def _page(name: str) -> HTMLResponse:
    html = files("deploy.http").joinpath(name).read_text(encoding="utf-8")
    return HTMLResponse(html, headers={"Content-Security-Policy": PAGE_POLICY})
