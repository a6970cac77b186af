"""What describes the service: the model, the health check, and pages for people."""

from __future__ import annotations

import base64
import hashlib
import io
import re
import secrets
from dataclasses import asdict
from functools import cache
from importlib.resources import files

from fastapi import APIRouter
from PIL import Image
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, Response

from blip2_actor.demo import SceneSampler, draw
from deploy.http.answers import Answer
from deploy.http.openapi import errors
from deploy.service import Service

_PAGE_POLICY = (
    "default-src 'none'; script-src {script}; style-src {style}; "
    "img-src blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""What a page may do: run its own script and style, known by their hashes, and ask this service."""

SCENE_SIDE_PX = 320


class ModelAnswer(Answer):
    """The model, and what a request that names nothing gets."""

    model: str
    image_size_px: int
    dtype: str
    caveat: str | None
    """What a user must know before reading this model's texts; null for published models."""
    digest: str
    """Identifies the content of the checkpoint."""
    quantize: str | None
    """How the weights are quantized; null if they are not."""
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

    @router.get("/v1/model", response_model=ModelAnswer, responses=errors(401, 404, 429, 503))
    async def describe(model: str | None = None) -> JSONResponse:
        """Describe a model, by default the first, and the options of a request that names none."""
        async with service.model(model) as served:
            return JSONResponse(
                asdict(served.info)
                | {
                    "model": served.name,
                    "caveat": served.info.caveat,
                    "options": asdict(served.options),
                    "score_model": None if served.matching is None else served.matching.model,
                }
            )

    @router.get("/healthz", response_model=HealthAnswer, responses=errors(503))
    @router.get("/readyz", response_model=HealthAnswer, responses=errors(503))
    async def readyz() -> JSONResponse:
        """Answer 200 when the service takes requests, also when many wait, else 503. Starts no engine."""
        await service.check_ready()
        return JSONResponse({"status": "ok"})

    @router.get("/livez", response_model=HealthAnswer, responses=errors(503))
    async def livez() -> JSONResponse:
        """Answer 200 while the service runs, also while it drains."""
        return JSONResponse({"status": "ok"})

    @router.get("/startupz", response_model=HealthAnswer, responses=errors(503))
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
        if service.first.info.model != "demo":
            raise HTTPException(404)
        png, caption = draw_scene_png()
        return Response(png, media_type="image/png", headers={"X-Caption": caption})

    return router


def draw_scene_png() -> tuple[bytes, str]:
    """Draw a scene that is not in the training set; return it as PNG, with its true caption."""
    scenes = SceneSampler("held_out", secrets.randbits(32)).sample(1)
    png = io.BytesIO()
    Image.fromarray(draw(scenes, SCENE_SIDE_PX)[0]).save(png, "PNG")
    return png.getvalue(), str(scenes.captions[0])


def _page(name: str) -> HTMLResponse:
    html, policy = _read_page(name)
    return HTMLResponse(html, headers={"Content-Security-Policy": policy})


@cache
def _read_page(name: str) -> tuple[str, str]:
    """Return a page and its content policy; styles and scripts from files become part of the page."""
    folder = files("deploy.http")
    html = folder.joinpath(name).read_text(encoding="utf-8")
    for part in re.findall(r"\{(\w+\.(?:css|js))\}", html):
        html = html.replace(f"{{{part}}}", folder.joinpath(part).read_text(encoding="utf-8"))
    policy = _PAGE_POLICY.format(script=_hash_of(html, "script"), style=_hash_of(html, "style"))
    return html, policy


def _hash_of(html: str, tag: str) -> str:
    """Return the source of a content policy that allows the one element with this tag."""
    _, _, rest = html.partition(f"<{tag}>")
    content, _, _ = rest.partition(f"</{tag}>")
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
