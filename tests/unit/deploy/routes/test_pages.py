"""The pages that describe the service work without others, and the schema is complete."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from dataclasses import fields

import httpx
import pytest
from pydantic import BaseModel

from blip2_actor import GenerationOptions, ModelInfo
from deploy.guard.access import OPEN_PATHS
from deploy.http.errors import ApiError
from deploy.http.served_model import ServedModel
from tests.unit.deploy.routes.engine_service import EngineService, ask, error_of


@pytest.fixture
def service() -> EngineService:
    return EngineService()


def test_no_engine_is_503_with_retry_after(service: EngineService) -> None:
    for path in ("/readyz", "/healthz", "/startupz", "/livez"):
        assert ask(service, "GET", path).json() == {"status": "ok"}
    service.full = ApiError(503, "not_ready", "no engine answers")
    for path in ("/readyz", "/healthz"):
        response = ask(service, "GET", path)
        assert error_of(response)[:2] == (503, "not_ready")
        assert response.headers["retry-after"] == "1"
    assert ask(service, "GET", "/startupz").status_code == 200


def test_the_page_uses_routes_that_exist(service: EngineService) -> None:
    page = ask(service, "GET", "/")
    assert page.headers["content-type"].startswith("text/html")
    for path in ("v1/model", "v1/caption", "scene.png"):
        assert path in page.text
        assert ask(service, "GET", f"/{path}").status_code != 404
    scene = ask(service, "GET", "/scene.png")
    assert scene.content.startswith(b"\x89PNG") and scene.headers["x-caption"].endswith("background")


def test_only_the_demonstration_draws_scenes(service: EngineService) -> None:
    info = ModelInfo(model="some/model", image_size_px=64, dtype="float32", digest="d")
    service._models.first = ServedModel(
        name="some/model", is_first=True, info=info, options=service.first.options
    )
    assert error_of(ask(service, "GET", "/scene.png"))[0] == 404
    assert ask(service, "GET", "/v1/model").json()["model"] == "some/model"


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_pages_load_nothing_from_elsewhere(service: EngineService, path: str) -> None:
    page = ask(service, "GET", path)
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert not re.findall(r"(?:src|href)=.?https?:|@import|import\(", page.text)


def test_each_model_of_the_document_has_a_name_of_its_own() -> None:
    """Two used to share a name, so one route's answers were documented with the columns of another."""

    def below(model: type[BaseModel]) -> Iterator[str]:
        for one in model.__subclasses__():
            if one.__module__.startswith("deploy."):
                yield one.__name__
            yield from below(one)

    names = list(below(BaseModel))
    assert len(names) > 20 and len(names) == len(set(names)), sorted(names)


def test_every_option_is_documented(service: EngineService) -> None:
    body = service.api.openapi()["components"]["schemas"]["CaptionBody"]
    options, _ = body["properties"]["options"]["anyOf"]
    assert options["properties"].keys() == {option.name for option in fields(GenerationOptions)}
    assert all(option["description"] for option in options["properties"].values())


def test_every_route_is_documented_with_its_answers(service: EngineService) -> None:
    schema = service.api.openapi()
    named = set(re.findall(r"#/components/schemas/(\w+)", str(schema)))
    assert named == schema["components"]["schemas"].keys(), "all are there, and none that nobody refers to"
    assert not [name for name in named if "__" in name], "two models share a name"
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            content = operation["responses"]["200"]["content"]
            assert all("$ref" in str(one["schema"]) for one in content.values()), path
            assert operation["description"], path
            if method == "post" and not path.startswith("/admin/"):
                assert {"400", "413", "415", "422", "503", "504"} <= operation["responses"].keys(), path
                assert "requestBody" in operation, path
            # The answers that `Access` and Serve's proxy give on any route, in our format.
            errors = {code: one for code, one in operation["responses"].items() if int(code) >= 400}
            assert {"400", "403", "503"} <= errors.keys(), path
            assert all("ErrorAnswer" in str(one["content"]) for one in errors.values()), path
            is_open = method == "get" and path in OPEN_PATHS
            assert ("401" in errors) == ("security" in operation) == (not is_open), path
    assert schema["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    body = schema["components"]["schemas"]["CaptionBody"]["properties"]
    assert all(field.get("description") for field in body.values())


def test_what_the_service_says_of_its_routes_has_serves_prefix(service: EngineService) -> None:
    async def get(path: str) -> httpx.Response:
        transport = httpx.ASGITransport(service.api, root_path="/blip2")
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost/blip2/") as client:
            return await client.get(path)

    assert error_of(asyncio.run(get("x")))[2].endswith("GET /blip2/docs lists the routes")
    assert asyncio.run(get("openapi.json")).json()["servers"] == [{"url": "/blip2"}]
