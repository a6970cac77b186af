"""Hosts, origins and keys: what a page in a browser, or a caller without a key, cannot do."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path

import httpx
import pytest
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from deploy.guard.access import OPEN_PATHS, Access
from deploy.guard.callers import CALLER
from deploy.guard.keys import KeyFile
from deploy.settings import Settings

KEYS = {"alice": "key of alice", "bob": "key of bob"}


async def who(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with the caller that admission sees."""
    caller = CALLER.get()
    answer = {"name": caller.name, "max_in_flight": caller.max_in_flight}
    await JSONResponse(answer)(scope, receive, send)


def ask(
    access: Access, method: str = "POST", path: str = "/v1/caption", root_path: str = "", **headers: str
) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(access, root_path=root_path, client=("10.0.0.9", 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
            given = {name.replace("_", "-"): value for name, value in headers.items()}
            return await client.request(method, path, headers=given)

    return asyncio.run(send())


def error_of(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["type"]


@pytest.mark.parametrize(
    "host", ["127.0.0.1:8000", "localhost", "LOCALHOST:8000", "10.1.2.3", "[::1]:8000", "[fe80::1]", ""]
)
def test_addresses_and_localhost_are_hosts(host: str) -> None:
    assert ask(Access(who), host=host).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.x"]
)
def test_other_names_are_hosts_only_if_they_are_listed(host: str) -> None:
    assert error_of(ask(Access(who), host=host)) == (400, "wrong_host")
    name = host.partition(":")[0]
    for allowed in (name.upper(), "*"):
        assert ask(Access(who, allowed_hosts=[allowed]), host=host).status_code == 200


def test_the_own_page_may_ask_and_other_pages_only_if_they_are_listed() -> None:
    own = ask(Access(who), origin="http://127.0.0.1:8000")
    assert own.status_code == 200 and "access-control-allow-origin" not in own.headers
    for origin in ("http://evil.example", "null", "http://127.0.0.1:9000"):
        refused = ask(Access(who, allowed_origins=["https://app.example"]), origin=origin)
        assert error_of(refused) == (403, "wrong_origin")
        assert "access-control-allow-origin" not in refused.headers


def test_a_listed_page_may_ask_and_read_answers_and_errors() -> None:
    page = "https://app.example"
    access = Access(who, allowed_origins=[page])
    preflight = ask(access, "OPTIONS", origin=page, access_control_request_method="POST")
    assert preflight.status_code == 204
    assert "authorization" in preflight.headers["access-control-allow-headers"]
    answer = ask(access, origin=page)
    for response in (preflight, answer):
        assert response.headers["access-control-allow-origin"] == page
        assert response.headers["vary"] == "Origin"


@pytest.mark.parametrize(
    ("asked", "allowed"),
    [
        ("authorization,content-type,x-stainless-arch", "authorization,content-type,x-stainless-arch"),
        ("a, b", "a, b"),
        ("a b", "authorization, content-type, x-request-id"),
        ("a,", "authorization, content-type, x-request-id"),
        ("", "authorization, content-type, x-request-id"),
    ],
)
def test_a_listed_page_may_send_the_headers_that_its_client_adds(asked: str, allowed: str) -> None:
    """Browsers used to block OpenAI's client, which sends x-stainless-lang and other headers."""
    page = "https://app.example"
    given = {"access_control_request_method": "POST", "access_control_request_headers": asked}
    preflight = ask(Access(who, allowed_origins=[page]), "OPTIONS", origin=page, **given)
    assert preflight.headers["access-control-allow-headers"] == allowed


@pytest.mark.parametrize(
    "origin",
    [
        "https://app.example/",
        "app.example",
        "https://",
        "HTTPS://a.example:443",
        "http://a.example:80",
        "https://*.example",
    ],
)
def test_origins_that_no_browser_sends_are_refused(origin: str) -> None:
    """The endpoint used to start, and then refuse every request of the page."""
    with pytest.raises(ValueError, match=r"allowed_origins must be an origin.* write scheme://host\[:port\]"):
        Settings(allowed_origins=(origin,))


@pytest.mark.parametrize(
    "host", ["api.example.com:8000", "http://api.example.com", "a/b", "*.example.com", ""]
)
def test_hosts_that_no_request_has_are_refused(host: str) -> None:
    with pytest.raises(ValueError, match="allowed_hosts must be a host name"):
        Settings(allowed_hosts=(host,))


def test_origins_and_hosts_that_can_match_are_taken() -> None:
    origins = (
        "*",
        "null",
        "https://App.example",
        "http://a.example:8080",
        "https://a:80",
        "http://[::1]:3000",
    )
    others = ("chrome-extension://abcdefgh", "http://localhost:5173", "file://")
    hosts = ("*", "blip2-serve-svc", "Api.example.com.", "[::1]", "::1", "2001:db8::5")
    Settings(allowed_origins=origins + others, allowed_hosts=hosts)


@pytest.fixture
def keys(tmp_path: Path) -> KeyFile:
    path = tmp_path / "keys.txt"
    hashes = {name: hashlib.sha256(key.encode()).hexdigest() for name, key in KEYS.items()}
    path.write_text(f"alice {hashes['alice']}\nbob {hashes['bob']} 7\n")
    return KeyFile(str(path))


def test_a_key_is_a_caller_with_a_quota(keys: KeyFile) -> None:
    access = Access(who, keys=keys, max_in_flight=256)
    assert ask(access, authorization="Bearer key of alice").json() == {"name": "alice", "max_in_flight": 256}
    assert ask(access, authorization="bearer key of bob").json() == {"name": "bob", "max_in_flight": 7}


@pytest.mark.parametrize("given", [{}, {"authorization": "Bearer x"}, {"authorization": "key of alice"}])
def test_without_a_key_only_probes_and_pages_are_answered(keys: KeyFile, given: dict[str, str]) -> None:
    access = Access(who, keys=keys)
    for path in ("/v1/caption", "/v1/model", "/metrics", "/v1/models"):
        answer = ask(access, "GET", path, **given)
        assert error_of(answer) == (401, "wrong_key")
        assert answer.headers["www-authenticate"] == "Bearer"
    assert error_of(ask(access, "POST", "/", **given)) == (401, "wrong_key")
    assert error_of(ask(access, "OPTIONS", "/v1/caption", **given)) == (401, "wrong_key")
    for path in OPEN_PATHS:
        for method in ("GET", "OPTIONS"):
            assert ask(access, method, path, **given).status_code == 200


def test_a_route_prefix_of_serve_opens_and_closes_the_same_paths(keys: KeyFile) -> None:
    """Serve keeps the prefix in the path; otherwise admin routes would be open to every key."""
    access, key = Access(who, keys=keys), {"authorization": "Bearer key of alice"}
    assert error_of(ask(access, path="/models/admin/drain", root_path="/models", **key)) == (404, "not_found")
    assert ask(access, "GET", "/models/readyz", root_path="/models").status_code == 200
    assert error_of(ask(access, "GET", "/models/v1/model", root_path="/models")) == (401, "wrong_key")


def test_without_a_key_file_a_caller_is_an_address() -> None:
    assert ask(Access(who)).json() == {"name": "10.0.0.9", "max_in_flight": None}
