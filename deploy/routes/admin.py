"""`/admin/…`: drain, logs and counters, for whoever has an admin key (`admin_keys_file`)."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse

from deploy.http.answers import Answer
from deploy.http.openapi import body_of, errors
from deploy.http.request_body import read_body
from deploy.http.wishes import Body
from deploy.observe.logs import LogLevel
from deploy.service import Service


class LogLevelBody(Body):
    level: LogLevel


class DrainAnswer(Answer):
    status: Literal["draining", "serving"]


class StatsAnswer(Answer):
    """One entry for each replica."""

    gateways: list[dict[str, Any]]
    engines: list[dict[str, Any]]


def admin_router(service: Service) -> APIRouter:
    """Return the operator's routes; `Access` lets only admin keys reach them."""
    router = APIRouter(tags=["admin"], prefix="/admin", responses=errors(401, 404))

    @router.post("/drain", response_model=DrainAnswer)
    async def drain() -> JSONResponse:
        """Be unready and refuse new requests with 503; those that have begun end in good order."""
        await service.fleet.set_draining(True)
        return JSONResponse({"status": "draining"})

    @router.post("/resume", response_model=DrainAnswer)
    async def resume() -> JSONResponse:
        """Take requests again."""
        await service.fleet.set_draining(False)
        return JSONResponse({"status": "serving"})

    @router.post(
        "/log-level",
        openapi_extra=body_of(LogLevelBody),
        response_model=LogLevelBody,
        responses=errors(400, 413, 415),
    )
    async def log_level(request: Request) -> JSONResponse:
        """Change how much the logs say, until the replicas are replaced."""
        body = await read_body(request, LogLevelBody, service.image_policy)
        await service.fleet.set_log_level(body.level)
        return JSONResponse({"level": body.level})

    @router.get("/stats", response_model=StatsAnswer)
    async def stats() -> JSONResponse:
        """Return the counters of every replica since its start."""
        return JSONResponse(await service.fleet.stats())

    return router
