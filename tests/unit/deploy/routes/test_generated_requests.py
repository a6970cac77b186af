"""Requests that Schemathesis generates from the endpoint's own schema, together with hostile ones.

No cluster is needed: the routes run in this process with a fake engine. Every answer must be documented, and
match its documented shape, and no request may cause a 500.
"""

from __future__ import annotations

import asyncio
import itertools
import json

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from blip2_actor import FetchPolicy
from deploy.http.api import create_api
from tests.unit.deploy.routes.engine_service import EngineService, base64_of, data_uri, png

pytestmark = pytest.mark.slow

NUM_EXAMPLES = 60
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
]


# A body of megabytes must be refused for its content, because Schemathesis does not count 413 as a refusal.
SERVICE = EngineService(image_policy=FetchPolicy(hosts=(), max_bytes=16 << 20))
SCHEMA = schemathesis.openapi.from_asgi("/openapi.json", create_api(SERVICE))

NAMES = ["image", "prompt", "options", "\ud800", "\udc00x", "\0", "é", "a" * 10_000, "", "__proto__"]
TEXTS = ["\ud83d", "\0", "\u202e", "\uffff", "🙂" * 50, "</s><image>", "data:image/png;base64,", "1e999", ""]
CHARSETS = ["utf-7", "utf-16", "punycode", "idna", "zlib_codec", "unicode_escape", "klingon", "utf-8", ""]
TYPES = [
    "application/json",
    "multipart/form-data; boundary=b",
    "image/png",
    "text/html",
    "",
    "a/b/c;;=",
    "*/*",
]


@SCHEMA.parametrize()
@settings(max_examples=NUM_EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_generated_requests_get_documented_answers(case: schemathesis.Case) -> None:
    # A form field is text: an object in its place is sent as its text, which is correct.
    is_form = case.media_type == "multipart/form-data"
    # `Access`, in front of the routes, refuses a missing key.
    needs_key = case.path.startswith("/admin/")
    has_all = not (is_form or needs_key)
    case.call_and_validate(checks=[one for one in CHECKS if has_all or one is not negative_data_rejection])


def test_hostile_requests_get_errors_of_our_shape() -> None:
    """Surrogates, charsets and headers, wherever a client can put them."""
    image = base64_of(png())

    async def send_all() -> list[httpx.Response]:
        transport = httpx.ASGITransport(SERVICE.api, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            found = []
            for path, (name, text) in itertools.product(
                ["/v1/caption", "/v1/chat/completions", "/v1/rerank", "/"], itertools.product(NAMES, TEXTS)
            ):
                fields = {"image": image, "inputs": image, "query": data_uri(png()), name: text}
                body = _as_json(fields | {"options": {name: text}, "messages": [{name: text, "role": text}]})
                headers = {"content-type": "application/json"}
                found.append(await client.post(path, content=body, headers=headers))
            for kind, charset in itertools.product(TYPES, CHARSETS):
                for body in (png(), b"--b\r\n\r\n", b'{"image": "\xff"}', b"--b--\r\n"):
                    headers = {"content-type": f"{kind}; charset={charset}"}
                    found.append(await client.post("/v1/caption", content=body, headers=headers))
            return found

    for response in asyncio.run(send_all()):
        assert response.status_code < 500, response.text
        if response.status_code >= 400:
            assert set(response.json()["error"]) == {"type", "message", "param", "code"}


def _as_json(fields: object) -> bytes:
    return json.dumps(fields).encode()
