"""Who may ask: the host by which a request came, the page that sent it, and its key.

A page in a browser can reach what its user can reach. So names of hosts are a list, against DNS rebinding,
and so are the origins of other pages.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import replace

from starlette.datastructures import MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deploy.guard.callers import CALLER, Caller
from deploy.guard.keys import KeyFile
from deploy.http.errors import ApiError
from deploy.observe.request_record import RECORD
from deploy.settings import is_address

OPEN_PATHS = ("/livez", "/readyz", "/startupz", "/healthz", "/", "/docs", "/openapi.json")
"""Paths that need no key to be read: probes, the page, and the description of the routes."""
ADMIN_PATHS = "/admin/"
"""Beginning of the paths that need an admin key."""
_CORS = {"Access-Control-Allow-Methods": "GET, POST", "Access-Control-Max-Age": "600"}
_OWN_HEADERS = "authorization, content-type, x-request-id"
_HEADER_NAMES = re.compile(r"[\w!#$%&'*+.^`|~-]+(, ?[\w!#$%&'*+.^`|~-]+)*", re.ASCII)


class Access:
    """ASGI middleware that lets a request through, with its caller, or answers 400, 401 or 403."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        allowed_hosts: Collection[str] = (),
        allowed_origins: Collection[str] = (),
        keys: KeyFile | None = None,
        admin_keys: KeyFile | None = None,
        max_in_flight: int | None = None,
    ) -> None:
        """Put the check before an application.

        Args:
            allowed_hosts: names next to localhost and addresses; "*" allows all.
            allowed_origins: origins of other pages, such as "https://app.example.com"; "*" allows all.
            keys: who may send requests; None allows everybody.
            admin_keys: who may operate the service; None allows nobody.
            max_in_flight: quota of a key that has none of its own.
        """
        self._app = app
        self._allowed_hosts = {host.lower() for host in allowed_hosts}
        self._allowed_origins = {origin.lower() for origin in allowed_origins}
        self._keys = keys
        self._admin_keys = admin_keys
        self._max_in_flight = max_in_flight

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get(b"host", "")
        origin = headers.get(b"origin")
        try:
            self._check_host(host)
            if origin is not None and origin.partition("://")[2].lower() != host.lower():
                self._check_origin(origin)
                send = _sharing_with(origin, send)
                if scope["method"] == "OPTIONS" and b"access-control-request-method" in headers:
                    # Clients in a browser, such as OpenAI's, send headers of their own.
                    asked = headers.get(b"access-control-request-headers", "")
                    may_send = asked if _HEADER_NAMES.fullmatch(asked) else _OWN_HEADERS
                    cors = _CORS | {"Access-Control-Allow-Headers": may_send}
                    await Response(status_code=204, headers=cors)(scope, receive, send)
                    return
            CALLER.set(self._caller(scope, headers.get(b"authorization")))
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _check_host(self, host: str) -> None:
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
        if not name or "*" in self._allowed_hosts or name.lower() in self._allowed_hosts:
            return
        if name.lower() != "localhost" and not is_address(name.strip("[]")):
            message = f"Host must be an address, localhost or one of allowed_hosts, got {name[:80]!r}"
            raise ApiError(400, "wrong_host", message)

    def _check_origin(self, origin: str) -> None:
        if not {"*", origin.lower()} & self._allowed_origins:
            message = f"Origin must be this endpoint or one of allowed_origins, got {origin[:80]!r}"
            raise ApiError(403, "wrong_origin", message)

    def _caller(self, scope: Scope, authorization: str | None) -> Caller:
        address = scope["client"][0] if scope.get("client") else ""
        keys = self._keys
        path = scope["path"].removeprefix(scope.get("root_path", ""))  # without Serve's route_prefix
        if path.startswith(ADMIN_PATHS):
            keys = self._admin_keys
            if keys is None:
                raise ApiError(404, "not_found", "this service has no admin keys (admin_keys_file)")
        is_open = scope["method"] in ("GET", "HEAD", "OPTIONS") and path in OPEN_PATHS
        if keys is None or is_open:
            return Caller(name=address)
        scheme, _, key = (authorization or "").partition(" ")
        caller = keys.caller_of(key.strip()) if scheme.lower() == "bearer" else None
        if caller is None:
            raise ApiError(
                401,
                "wrong_key",
                "Authorization must be Bearer and a valid key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        RECORD.get().key = caller.name
        return replace(caller, max_in_flight=caller.max_in_flight or self._max_in_flight)


def _sharing_with(origin: str, send: Send) -> Send:
    """Return `send` that lets the page of an allowed origin read the answer."""

    async def share(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["Access-Control-Allow-Origin"] = origin
            headers["Access-Control-Expose-Headers"] = "retry-after, x-request-id"
            headers.add_vary_header("Origin")
        await send(message)

    return share
