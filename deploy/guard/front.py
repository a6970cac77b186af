"""The front of the endpoint, inside Serve's proxy: before Serve reads a header, and after it answers.

Serve's proxy obeys headers of its own from anybody, holds bodies without a limit, and answers in plain text
while the application starts, drains or has lost a replica. Ray calls `middlewares` in each proxy if the
environment of its node says so:

    RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=deploy.guard.front.middlewares

It has no settings: keys, hosts and costs are the gateway's.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math

from starlette.middleware import Middleware
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deploy import APPLICATION
from deploy.guard.access import ADMIN_PATHS
from deploy.guard.connection import install
from deploy.guard.request_headers import check_headers, for_serve, request_id_of
from deploy.guard.uploads import PASSED_BODY, Body, Uploads, give_back_large_memory
from deploy.http.errors import (
    BEING_SERVED,
    RETRY_AFTER_S,
    ApiError,
    not_ready,
    overloaded,
    shorten,
    unavailable,
)
from deploy.observe.metrics import FRONT_ANSWERS

CALLBACK = ("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", f"{__name__}.middlewares")
"""The environment variable that puts the front into Serve's proxies, and its value."""
HEALTH_PATH, ROUTES_PATH = SERVE_PATHS = ("/-/healthz", "/-/routes")
"""Paths that Serve's proxy answers itself, for Ray and KubeRay, which expect its plain text."""
LIVE_PATH = "/livez"
BATCH_PATH = "/v1/batch"
READY_PATHS = ("/readyz", "/healthz")
"""Ends of paths, because the prefix of the application is not known here."""
FULL = BEING_SERVED.encode()
"""Text in the answer of a gateway that can take no more requests."""
MIN_LIMIT = 64
"""Minimum of a limit; a gateway can itself refuse this many requests within a second."""
LIMIT_GROWTH = 0.1
"""Amount by which each answer raises a limit. With 1, the gateways would refuse one request for each that
they serve; with less, it takes longer until new gateways are used."""

logger = logging.getLogger("ray.serve")


def middlewares() -> list[Middleware]:
    """Return what Ray puts around its proxy, and set limits on connections and memory of this process."""
    install()
    give_back_large_memory()
    return [Middleware(Front)]


class Front:
    """Refuses what must not reach Serve, and gives each of Serve's own answers the shape of ours."""

    def __init__(self, serve: ASGIApp) -> None:
        self._serve = serve
        self._uploads = Uploads()
        self._limit = LearnedLimit()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in SERVE_PATHS:
            await self._serve(scope, receive, send)
            return
        try:
            check_headers(scope["headers"])
            answer = await self._answer_here(scope)
        except ApiError as error:
            answer = self._in_place(scope, error)
        if answer is not None:
            await answer(scope, receive, send)
            return
        await self._pass_on(scope, receive, send)

    async def _answer_here(self, scope: Scope) -> Response | None:
        if scope["path"] == LIVE_PATH:
            return _live(scope["method"])
        if (scope["method"], scope["path"]) == ("OPTIONS", "*"):  # which asks about the server as a whole
            return Response(status_code=204, headers={"Allow": "GET, HEAD, POST, OPTIONS"})
        if scope["path"].endswith(READY_PATHS):
            code, _ = await self._ask_serve(scope, HEALTH_PATH)  # whether it has routes and is not drained
            if code != 200:
                raise not_ready("this node is starting or draining")
        if _counts(scope) and self._uploads.num_complete >= self._limit.value:
            raise overloaded("the gateways have all the requests that they take", self._limit.retry_after_s)
        return None

    async def _ask_serve(self, scope: Scope, path: str) -> tuple[int, bytes]:
        """Return code and body of what Serve's proxy answers to GET for one of its own paths."""
        messages: list[Message] = []

        async def receive() -> Message:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Message) -> None:
            messages.append(message)

        asked = {"method": "GET", "path": path, "raw_path": path.encode(), "headers": [], "query_string": b""}
        await self._serve({**scope, **asked}, receive, send)
        return messages[0]["status"], b"".join(message.get("body", b"") for message in messages)

    async def _in_place_of(self, scope: Scope, code: int | None) -> ApiError:
        """Return the answer in place of Serve's own or a missing one: 404 if no route has the path."""
        if code == 408:
            return ApiError(504, "timeout", "no answer within the time that Serve's proxy allows; try again")
        if code == 404:
            has_routes, routes = await self._ask_serve(scope, ROUTES_PATH)
            prefixes = json.loads(routes) if has_routes == 200 else {}
            # If only other applications have routes, this one may be away for an update.
            is_served = APPLICATION in prefixes.values() and not scope["path"].startswith(tuple(prefixes))
            if is_served:
                said = f"there is no {shorten(scope['path'])}; paths here begin with {' or '.join(prefixes)}"
                return ApiError(404, "not_found", said)
            return unavailable("no application is running here: it starts, is updated or ends")
        if code in (429, 503):
            return unavailable("no gateway can take the request now")
        return unavailable("the gateway of this request has ended")

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope = {**scope, "headers": for_serve(scope["headers"])}
        given, counts = dict(scope["headers"]), _counts(scope)
        # Serve and the gateway know no HEAD; the server drops the body of its answer.
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        body = Body(self._uploads, _client_of(scope), receive, given, is_counted=counts)
        answer = Answer(send)
        try:
            await self._serve_with({**scope, "method": method}, body, answer)
        except Exception:
            if answer.code is not None:
                raise
            logger.exception("Serve's proxy failed on a request")
        finally:
            body.release()
        if answer.code is not None:
            if counts:
                self._limit.learn(self._uploads.num_complete, answer)
        elif not body.has_left:
            error = body.refusal or await self._in_place_of(scope, answer.held_back)
            await self._in_place(scope, error)(scope, receive, send)

    async def _serve_with(self, scope: Scope, body: Body, answer: Answer) -> None:
        """Have Serve answer a request; a small body goes with it."""
        if body.is_small:
            message = await body()
            if message["type"] != "http.request":
                return
            scope[PASSED_BODY] = message.get("body", b"")
            body.give_again(message)
        await self._serve(scope, body, answer)

    def _in_place(self, scope: Scope, error: ApiError) -> Response:
        """Return an answer in place of the gateway's, counted and logged."""
        FRONT_ANSWERS.inc(1, {"code": str(error.code), "type": error.type})
        fields = {"method": scope["method"], "code": error.code, "error_type": error.type}
        logger.info("answered by the front", extra=fields)
        response = error.response()
        response.headers["X-Request-ID"] = request_id_of(scope["headers"]).decode()
        return response


class LearnedLimit:
    """How many requests the gateways take from this proxy, as their refusals say.

    Passing a request to a gateway costs ten times as much as an answer here. A flood of more requests than
    can be passed on would have to wait for its refusals, and so would all requests behind it.
    """

    def __init__(self) -> None:
        self.value = math.inf
        self.retry_after_s = float(RETRY_AFTER_S)
        """The pause that the last refusal asked for."""

    def learn(self, num_others: int, answer: Answer) -> None:
        """Lower the limit to the requests in flight after a refusal; raise it a little after other answers.

        Args:
            num_others: requests of this proxy that the gateways have, without this one.
        """
        if answer.is_full:
            self.value = max(MIN_LIMIT, num_others)
            self.retry_after_s = answer.retry_after_s
        elif answer.code != 503:  # a gateway that ends, or finds no engine, says nothing about the next
            self.value += LIMIT_GROWTH


class Answer:
    """ASGI `send` that holds back the plain text which Serve writes in place of an answer of the gateway."""

    def __init__(self, send: Send) -> None:
        self.code: int | None = None
        """The code that was sent to the client; None until then."""
        self.held_back: int | None = None
        """The code of Serve's own answer, which was not sent."""
        self.retry_after_s = float(RETRY_AFTER_S)
        """The Retry-After of a 503."""
        self.is_full = False
        """Whether it is the 503 of a gateway that can take no more requests."""
        self._send = send

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start" and _is_plain_text_error(message):
            self.held_back = message["status"]
        elif self.code == 503 and FULL in message.get("body", b""):
            self.is_full = True
        elif message.get("status") == 503:
            headers = {name.lower(): value for name, value in message["headers"]}
            self.retry_after_s = float(headers.get(b"retry-after", RETRY_AFTER_S))
        if self.held_back is None:
            self.code = message.get("status", self.code)
            await self._send(message)


def _live(method: str) -> Response:
    allow = {"Allow": "GET, HEAD, OPTIONS"}
    if method == "OPTIONS":
        return Response(status_code=204, headers=allow)
    if method not in ("GET", "HEAD"):
        said = f"{LIVE_PATH!r} must be called with {allow['Allow']}, got {method}"
        raise ApiError(405, "method_not_allowed", said, headers=allow)
    return JSONResponse({"status": "ok"})


def _counts(scope: Scope) -> bool:
    """Return whether a request is one of those that gateways limit together.

    Batch work has its own limit, and operators have none: they may need to drain an overloaded service.
    """
    path = scope["path"]
    return scope["method"] == "POST" and not path.endswith(BATCH_PATH) and ADMIN_PATHS not in path


def _is_plain_text_error(start: Message) -> bool:
    kind: bytes = next((value for name, value in start["headers"] if name.lower() == b"content-type"), b"")
    return start["status"] >= 400 and kind.startswith(b"text/plain")


def _client_of(scope: Scope) -> str:
    """Return a name for the sender: a hash of the unchecked key, or else the address.

    All batch work has one name, so that its bodies together hold at most half of the bytes.
    """
    if scope["path"].endswith(BATCH_PATH):
        return BATCH_PATH
    key = dict(scope["headers"]).get(b"authorization")
    if key is not None:
        return hashlib.sha256(key).hexdigest()
    return scope["client"][0] if scope.get("client") else ""
