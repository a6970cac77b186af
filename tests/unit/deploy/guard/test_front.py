"""The front around a stand-in for Serve's proxy: what is refused, what passes, and in which form."""

from __future__ import annotations

import asyncio
import gc
import pickle
import re
import weakref
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import ray
from ray.exceptions import TaskCancelledError
from ray.serve._private import replica
from ray.serve._private.common import StreamingHTTPRequest
from starlette.types import Message, Receive, Scope, Send

from deploy.guard import front, uploads
from deploy.guard.front import Front
from deploy.guard.uploads import PASSED_BODY, PASSED_BYTES, Body, Uploads
from deploy.http.errors import ApiError, full, overloaded, unavailable


class Proxy:
    """Reads the whole body, as Serve's proxy does, and replies as the test asks."""

    def __init__(self, code: int = 200, kind: bytes = b"application/json") -> None:
        self.code = code
        self.kind = kind
        self.healthy = 200
        self.routes = b"{}"
        self.error: Exception | None = None
        self.scopes: list[Scope] = []
        self.bodies: list[bytes] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/-/healthz":
            await self._answer(self.healthy, b"text/plain", send)
            return
        if scope["path"] == "/-/routes":
            await self._answer(200, b"application/json", send, self.routes)
            return
        self.scopes.append(scope)
        while True:  # it may ask for a body that was passed, too
            message: Message = await receive()
            if message["type"] == "http.disconnect":
                return  # Serve cancels the request, and answers nothing
            self.bodies.append(message["body"])
            if not message["more_body"]:
                break
        if self.error is not None:
            raise self.error
        if self.code:
            await self._answer(self.code, self.kind, send)

    async def _answer(self, code: int, kind: bytes, send: Send, body: bytes = b"{}") -> None:
        await send({"type": "http.response.start", "status": code, "headers": [[b"content-type", kind]]})
        await send({"type": "http.response.body", "body": body})


def ask(front: Front, method: str = "POST", path: str = "/v1/caption", **request: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(front)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await asyncio.wait_for(client.request(method, path, **request), 10)

    return asyncio.run(send())


def error_of(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["type"]


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ([("content-type", "multipart/form-data; boundary=xx; charset=punycode")], 415),
        ([("content-type", 'multipart/form-data; boundary=xx; charset="UTF-16"')], 415),
        ([("content-type", "application/json; charset=latin-1")], 415),
        ([("content-type", "application/json" + ";" * 1024)], 400),
        ([("content-encoding", "gzip")], 415),
        ([("transfer-encoding", "gzip, chunked")], 415),
        ([("transfer-encoding", "gzip"), ("transfer-encoding", "chunked")], 400),
        ([("x-request-id", "\xff\xfe".encode("latin-1"))], 400),
        ([("x-request-id", "a" * 129)], 400),
        ([("x-request-id", "a b")], 400),
        ([("content-type", "application/json"), ("content-type", "text/plain")], 400),
        ([("host", "a"), ("host", "b")], 400),
        ([("authorization", "Bearer a"), ("authorization", "Bearer b")], 400),
    ],
)
def test_what_would_be_read_two_ways_or_decoded_slowly_is_refused(headers: Any, code: int) -> None:
    serve = Proxy()
    answer = ask(Front(serve), content=b"x", headers=headers)
    assert error_of(answer)[0] == code
    assert not serve.scopes


@pytest.mark.parametrize(
    ("headers", "request_id"),
    [
        ({"x-request-id": "mine", "content-encoding": "gzip"}, "mine"),
        ({"content-encoding": "gzip"}, "[0-9a-f]{32}"),
        ({"x-request-id": "a b"}, "[0-9a-f]{32}"),
    ],
)
def test_a_refusal_has_a_request_id(headers: dict[str, str], request_id: str) -> None:
    """As with all answers of the gateway, callers can then tell which of their requests was refused."""
    assert re.fullmatch(request_id, ask(Front(Proxy()), headers=headers).headers["x-request-id"])


def test_utf8_may_be_named() -> None:
    for given in ("application/json", "application/json; charset=utf-8", 'text/plain; charset="UTF8"'):
        assert ask(Front(Proxy()), headers={"content-type": given}).status_code == 200


def test_headers_that_steer_serves_proxy_go_no_further() -> None:
    steering = {
        "x-request-disconnect-disabled": "?1",
        "X-Request-Timeout-Seconds": "0.0001",
        "serve_multiplexed_model_id": b"\xff",
        "serve-multiplexed-model-id": "a",
        "x-session-id": "a",
        "X_Session_Id": "a",
        "x-serve-router-pick": "a",
        "traceparent": "a",
    }
    serve = Proxy()
    ask(Front(serve), headers=steering | {"x-request-id": "mine", "x-other": "kept"})
    [scope] = serve.scopes
    names = {name.decode() for name, _ in scope["headers"]}
    assert not names & {name.lower() for name in steering}
    assert {"x-request-id", "x-other", "host"} <= names
    assert dict(scope["headers"])[b"x-request-id"] == b"mine"


def test_livez_says_which_methods_it_has() -> None:
    serve = Proxy()
    options, post = (ask(Front(serve), method, "/livez") for method in ("OPTIONS", "POST"))
    assert (options.status_code, options.content) == (204, b"")
    assert error_of(post) == (405, "method_not_allowed")
    assert options.headers["allow"] == post.headers["allow"] == "GET, HEAD, OPTIONS"
    assert not serve.scopes


def test_head_is_get_without_a_body() -> None:
    serve = Proxy()
    assert ask(Front(serve), "HEAD", "/v1/model").status_code == 200
    assert serve.scopes[0]["method"] == "GET"


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (404, (503, "unavailable")),
        (408, (504, "timeout")),
        (429, (503, "unavailable")),
        (500, (503, "unavailable")),
        (503, (503, "unavailable")),
        (0, (503, "unavailable")),
    ],
)
def test_serves_own_answers_have_our_shape(code: int, expected: tuple[int, str]) -> None:
    answer = ask(Front(Proxy(code, b"text/plain; charset=utf-8")), headers={"x-request-id": "mine"})
    assert error_of(answer) == expected
    assert answer.headers["x-request-id"] == "mine"
    assert (answer.headers.get("retry-after") == "1") == (expected[0] == 503)


def test_a_path_outside_of_all_routes_is_no_reason_to_try_again() -> None:
    """Clients used to retry forever, because the answer was that of an application that is starting."""
    serve = Proxy(404, b"text/plain; charset=utf-8")
    serve.routes = b'{"/blip2": "blip2"}'
    answer = ask(Front(serve), path="/v1/caption")
    assert error_of(answer) == (404, "not_found")
    assert answer.json()["error"]["message"] == "there is no '/v1/caption'; paths here begin with /blip2"


@pytest.mark.parametrize("routes", [b'{"/other": "other"}', b'{"/v1": "blip2"}', b"{}"])
def test_an_application_that_may_come_back_is_asked_again(routes: bytes) -> None:
    serve = Proxy(404, b"text/plain; charset=utf-8")
    serve.routes = routes
    assert error_of(ask(Front(serve), path="/v1/caption")) == (503, "unavailable")


def test_options_of_the_server_as_a_whole() -> None:
    async def begin(scope: Scope) -> Message:
        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)

        await Front(Proxy(404, b"text/plain"))(scope, receive, send)
        return sent[0]

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    answer = asyncio.run(begin({"type": "http", "method": "OPTIONS", "path": "*", "headers": []}))
    assert answer["status"] == 204 and (b"allow", b"GET, HEAD, POST, OPTIONS") in answer["headers"]


class Gateways(Proxy):
    """Holds requests until they are released, and refuses those beyond its limit."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit
        self.held: list[asyncio.Event] = []
        self.num_asked = 0

    async def _answer(self, code: int, kind: bytes, send: Send, body: bytes = b"{}") -> None:
        self.num_asked += 1
        if len(self.held) >= self.limit:
            response = full(6, 7.2).response()
            start = {"type": "http.response.start", "status": 503, "headers": response.raw_headers}
            await send(start)
            await send({"type": "http.response.body", "body": bytes(response.body)})
            return
        go = asyncio.Event()
        self.held.append(go)
        await go.wait()
        self.held.remove(go)
        await super()._answer(code, kind, send)


def test_the_front_refuses_what_the_gateways_would_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offered five times what the endpoint can serve, refusals used to wait for seconds in the gateways."""
    monkeypatch.setattr(front, "MIN_LIMIT", 4)

    async def flood() -> None:
        serve = Gateways(limit=6)
        guarded = Front(serve)
        transport = httpx.ASGITransport(guarded)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:

            async def post(path: str = "/v1/caption") -> httpx.Response:
                return await client.post(path, content=b"x")

            running = [asyncio.create_task(post()) for _ in range(6)]
            while len(serve.held) < 6:
                await asyncio.sleep(0)
            assert error_of(await post()) == (503, "overloaded")
            assert serve.num_asked == 7
            answer = await post()
            assert error_of(answer) == (503, "overloaded") and answer.headers["retry-after"] == "8"
            assert serve.num_asked == 7, "the front has answered"
            # Batch work has its own limit; probes and operators have none.
            await post("/v1/batch")
            await post("/admin/drain")
            assert serve.num_asked == 9 and guarded._limit.value == 6
            assert (await client.get("/livez")).status_code == 200
            # A place that is free is taken again, and answers make room for more.
            serve.limit = 100
            serve.held[0].set()
            await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            more = asyncio.create_task(post())
            while len(serve.held) < 6:
                await asyncio.sleep(0)
            before = guarded._limit.value
            for go in list(serve.held):
                go.set()
            answers = await asyncio.gather(*running, more)
            assert {answer.status_code for answer in answers} == {200}
            assert guarded._limit.value == pytest.approx(before + 6 * front.LIMIT_GROWTH)
            assert guarded._uploads.num_complete == 0

    asyncio.run(flood())


@pytest.mark.parametrize(
    ("refusal", "limit"),
    [(unavailable("it ends"), 80.0), (overloaded("no engine can take it"), 80.0), (full(9, 1.0), 64.0)],
)
def test_only_a_full_gateway_lowers_the_limit(refusal: ApiError, limit: float) -> None:
    """A gateway that ends, or whose engine has died, tells nothing about the next one.

    A few requests never wait long for a refusal.
    """

    class Refusing(Proxy):
        async def _answer(self, code: int, kind: bytes, send: Send, body: bytes = b"{}") -> None:
            response = refusal.response()
            await send({"type": "http.response.start", "status": 503, "headers": response.raw_headers})
            await send({"type": "http.response.body", "body": bytes(response.body)})

    guarded = Front(Refusing())
    guarded._limit.value = 80.0
    assert ask(guarded).status_code == 503
    assert guarded._limit.value == limit


def test_what_gateways_do_not_limit_with_the_others_takes_none_of_their_places() -> None:
    """Batch work takes long, and a job sends much of it: the front must not refuse captions because of it."""

    async def send_both() -> httpx.Response:
        serve = Gateways(limit=100)
        guarded = Front(serve)
        guarded._limit.value = 2.0
        transport = httpx.ASGITransport(guarded)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            batches = [asyncio.create_task(client.post("/v1/batch", content=b"x")) for _ in range(3)]
            while len(serve.held) < 3:
                await asyncio.sleep(0)
            caption = asyncio.create_task(client.post("/v1/caption", content=b"x"))
            while len(serve.held) < 4 and not caption.done():
                await asyncio.sleep(0)
            assert guarded._uploads.num_complete == 1
            for go in list(serve.held):
                go.set()
            await asyncio.gather(*batches)
            return await caption

    assert asyncio.run(send_both()).status_code == 200


def test_an_error_inside_serves_proxy_is_503() -> None:
    serve = Proxy()
    serve.error = RuntimeError("a secret")
    answer = ask(Front(serve))
    assert error_of(answer) == (503, "unavailable") and "secret" not in answer.text


def test_answers_of_the_gateway_and_serves_probes_are_not_touched() -> None:
    assert ask(Front(Proxy(404))).content == b"{}"
    serve = Proxy()
    serve.healthy = 503
    answer = ask(Front(serve), "GET", "/-/healthz")
    assert (answer.status_code, answer.headers["content-type"]) == (503, "text/plain")


def test_a_draining_node_is_alive_and_not_ready() -> None:
    serve = Proxy()
    serve.healthy = 503
    front = Front(serve)
    assert ask(front, "GET", "/livez").json() == {"status": "ok"}
    for path in ("/readyz", "/healthz", "/prefix/readyz"):
        assert error_of(ask(front, "GET", path)) == (503, "not_ready")
    assert not serve.scopes
    serve.healthy = 200
    assert ask(front, "GET", "/readyz").status_code == 200
    assert serve.scopes[0]["path"] == "/readyz"


def test_a_body_that_pauses_is_408(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "BODY_PAUSE_S", 0.02)
    serve = Proxy()

    async def slow() -> AsyncIterator[bytes]:
        yield b"x"
        await asyncio.Event().wait()

    assert error_of(ask(Front(serve), content=slow())) == (408, "body_late")


def test_a_body_is_passed_on_when_all_of_it_is_here() -> None:
    """Each piece of a slow upload used to take memory in the gateway and in Ray's object store too."""
    serve = Proxy()

    async def pieces() -> AsyncIterator[bytes]:
        for piece in (b"a", b"b", b"", b"c"):
            yield piece
            assert not serve.bodies

    assert ask(Front(serve), content=pieces()).status_code == 200
    assert serve.bodies == [b"abc"]


def test_a_small_body_goes_with_its_request() -> None:
    """Two calls back to the proxy, for the body and for the connection's end, used to be most of the cost."""

    async def pieces() -> AsyncIterator[bytes]:
        yield b"chunked"

    proxy = Proxy()
    small, large = b"x" * PASSED_BYTES, b"x" * (PASSED_BYTES + 1)
    for content in (small, large, pieces(), b""):
        assert ask(Front(proxy), content=content).status_code == 200
    assert proxy.bodies == [small, large, b"chunked", b""]
    assert [scope.get(PASSED_BODY) for scope in proxy.scopes] == [small, None, None, b""]


@pytest.fixture
def gateway_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this process accept bodies as a gateway's process does, until the end of the test."""
    monkeypatch.setattr(replica, "ASGIReceiveProxy", replica.ASGIReceiveProxy)
    monkeypatch.setattr(
        StreamingHTTPRequest, "receive_asgi_messages", StreamingHTTPRequest.receive_asgi_messages
    )
    uploads.take_passed_bodies()
    uploads.take_passed_bodies()  # of another gateway in this process


@pytest.mark.parametrize("is_passed", [True, False])
def test_the_gateway_asks_the_proxy_only_for_a_body_that_was_not_passed(
    gateway_process: None, is_passed: bool
) -> None:
    num_asked = 0

    async def ask_proxy(_: object) -> bytes:
        nonlocal num_asked
        num_asked += 1
        end = {"type": "http.disconnect"}
        return pickle.dumps([{"type": "http.request", "body": b"asked", "more_body": False}, end])

    async def read() -> bytes:
        scope: Scope = {"type": "http"} | ({PASSED_BODY: b"passed"} if is_passed else {})
        receive = replica.ASGIReceiveProxy(scope, None, ask_proxy)
        await receive.fetch_until_disconnect()
        body: bytes = (await receive())["body"]
        assert PASSED_BODY not in scope
        return body

    assert asyncio.run(read()) == (b"passed" if is_passed else b"asked")
    assert num_asked == (0 if is_passed else 1)


def test_a_client_that_leaves_while_its_body_is_fetched_is_no_failure(gateway_process: None) -> None:
    """The proxy cancels the call that fetches it; one of a hundred such requests used to count as 500."""

    async def cancelled(_: object) -> bytes:
        raise TaskCancelledError

    async def read() -> Message:
        receive = replica.ASGIReceiveProxy({"type": "http"}, None, cancelled)
        await receive.fetch_until_disconnect()
        return await receive()

    assert asyncio.run(read()) == {"type": "http.disconnect"}


def test_the_gateway_looks_up_the_proxy_only_to_ask_it(
    gateway_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_up: list[str] = []

    class Method:
        def remote(self, _: object) -> str:
            return "asked"

    def get_actor(name: str, **_: object) -> SimpleNamespace:
        looked_up.append(name)
        return SimpleNamespace(receive_asgi_messages=Method())

    monkeypatch.setattr(ray, "get_actor", get_actor)
    request = StreamingHTTPRequest({"type": "http"}, proxy_actor_name="proxy")
    receive = request.receive_asgi_messages
    assert not looked_up
    assert receive(None) == "asked"
    assert looked_up == ["proxy"]


@pytest.mark.parametrize(
    ("media", "code"), [("Application/JSON; charset=utf-8", 400), ("image/png", 200), ("", 200)]
)
def test_json_of_too_many_values_is_refused_before_most_of_it_is_here(media: str, code: int) -> None:
    """A gateway also refuses it, but after both processes have copied all of it several times."""
    num_sent = 0

    async def lists() -> AsyncIterator[bytes]:
        nonlocal num_sent
        for _ in range(100):
            num_sent += 1
            yield b"[]," * 10_000

    serve = Proxy()
    answer = ask(Front(serve), content=lists(), headers={"content-type": media})
    assert answer.status_code == code
    if code == 400:
        assert "commas" in answer.json()["error"]["message"]
        assert num_sent < 20 and not serve.bodies


def test_a_client_that_leaves_in_its_body_is_no_refusal() -> None:
    async def leave() -> Message:
        return messages.pop(0)

    async def read() -> None:
        body = Body(Uploads(), "a", leave, {})
        assert await body() == {"type": "http.disconnect"}
        assert body.refusal is None and not body.is_complete

    messages: list[Message] = [
        {"type": "http.request", "body": b"a", "more_body": True},
        {"type": "http.disconnect"},
    ]
    asyncio.run(read())


@pytest.mark.parametrize("is_whole", [False, True])
def test_a_client_that_leaves_gets_no_answer_and_counts_as_none(
    is_whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It used to be logged and counted as a gateway that had ended."""
    counted: list[object] = []
    monkeypatch.setattr(front.FRONT_ANSWERS, "inc", lambda *answer: counted.append(answer))
    sent: list[Message] = []

    async def wait_for_client(_: Scope, receive: Receive, __: Send) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    async def send(message: Message) -> None:
        sent.append(message)

    async def run(declared_bytes: bytes) -> None:
        messages: list[Message] = [
            {"type": "http.request", "body": b"a", "more_body": not is_whole},
            {"type": "http.disconnect"},
        ]

        async def receive() -> Message:
            return messages.pop(0)

        headers = [(b"content-length", declared_bytes)]
        scope = {"type": "http", "method": "POST", "path": "/v1/caption", "headers": headers}
        await Front(wait_for_client)(scope, receive, send)

    for declared_bytes in (b"2", b"100000"):  # a small body is passed with its request
        asyncio.run(run(declared_bytes))
    assert not sent and not counted


def test_a_refused_body_is_freed_with_its_request() -> None:
    """The refusal's traceback used to keep the body until Python collected cycles."""

    class Watched(dict[str, Any]):
        """A message that can have a weak reference."""

    held = Uploads(8 << 20)
    messages = [Watched(type="http.request", body=bytes(5 << 20), more_body=True)]
    last = weakref.ref(messages[0])

    async def receive() -> Message:
        return messages.pop()

    async def read() -> None:
        body = Body(held, "a", receive, {})
        assert (await body())["type"] == "http.disconnect" and body.refusal is not None
        body.release()

    gc.disable()
    try:
        asyncio.run(read())
        assert last() is None
    finally:
        gc.enable()


def small_front(serve: Proxy) -> Front:
    front = Front(serve)
    front._uploads = Uploads(8 << 20)
    return front


def test_a_body_with_more_bytes_than_a_client_may_have_is_413() -> None:
    """It used to be told to retry later, forever."""
    front = small_front(Proxy())
    assert ask(front, content=bytes(4 << 20)).status_code == 200

    async def undeclared() -> AsyncIterator[bytes]:
        for _ in range(5):
            yield bytes(1 << 20)

    for body in (bytes((4 << 20) + 1), undeclared()):
        answer = ask(front, content=body)
        assert error_of(answer) == (413, "too_large") and "retry-after" not in answer.headers
    # All reserved bytes are released, however the request ended.
    assert front._uploads.num_bytes == 0 and not front._uploads.num_claimed_of


async def test_what_a_client_announces_counts_before_it_is_here() -> None:
    """Its bodies used to start side by side, and those that did not fit were read almost to their end."""
    held = Uploads(8 << 20)

    async def receive() -> Message:
        has_begun.set()
        await asyncio.Event().wait()
        raise AssertionError

    def body_of(client: str, num_bytes: int) -> Body:
        return Body(held, client, receive, {b"content-length": b"%d" % num_bytes})

    has_begun = asyncio.Event()
    first = body_of("a", 3 << 20)
    reading = asyncio.create_task(first())
    await has_begun.wait()
    second = body_of("a", 2 << 20)
    assert (await second())["type"] == "http.disconnect"
    assert second.refusal is not None and second.refusal.code == 429
    assert second.refusal.response().headers["retry-after"] == "10"
    # A small body, and one of another client, still pass.
    others = [body_of("a", 1 << 20), body_of("b", 4 << 20)]
    tasks = [asyncio.create_task(other()) for other in others]
    await asyncio.sleep(0)
    assert not any(task.done() for task in tasks)
    for task in (reading, *tasks):
        task.cancel()
    for body in (first, second, *others):
        body.release()
    assert not held.num_claimed_of and not held.num_bytes


def test_large_bodies_leave_room_for_small_ones() -> None:
    held = Uploads(8 << 20)
    held.num_bytes = 6 << 20
    front = small_front(Proxy())
    front._uploads = held
    assert error_of(ask(front, content=bytes(2 << 20))) == (503, "overloaded")
    assert ask(front, content=bytes(1 << 20)).status_code == 200
