"""A server with guarded connections: headers are bounded, and anything but HTTP/1.1 is answered in JSON."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from deploy.guard import connection
from deploy.guard.connection import GuardedConnection

Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[bytes]]


received: list[str] = []
"""The types of the messages that /late has received."""


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer at once, before the body has arrived; under /wait, wait for it."""
    if scope["path"] == "/later":
        await asyncio.sleep(0.02)  # meanwhile, data after this request is read
    if scope["path"] == "/late":
        await asyncio.sleep(0.02)
        received.append((await receive())["type"])
        return
    if scope["path"] == "/wait":
        while (await receive())["type"] != "http.disconnect":
            pass
        return
    if scope["path"] == "/echo":
        body = b""
        while (message := await receive())["more_body"]:
            body += message["body"]
        names = b" ".join(name for name, _ in scope["headers"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body + message["body"] + b" " + names + b"\n"})
        return
    if scope["path"] == "/stream":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for piece in (b"one", b"", b" two"):
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
        return
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


def talk(talk: Talk) -> bytes:
    """Return what the client read until the server closed the connection."""

    async def run() -> bytes:
        config = uvicorn.Config(app, http=GuardedConnection, lifespan="off", log_config=None)
        config.load()
        server = uvicorn.Server(config)

        def make() -> GuardedConnection:
            return GuardedConnection(config, server.server_state, {})

        listening = await asyncio.get_running_loop().create_server(make, "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*listening.sockets[0].getsockname())
        try:
            return await asyncio.wait_for(talk(reader, writer), 5)
        finally:
            writer.close()
            listening.close()
            async with asyncio.timeout(5):
                while server.server_state.connections or server.server_state.tasks:
                    await asyncio.sleep(0.001)

    return asyncio.run(run())


def send(data: bytes) -> bytes:
    async def talk_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        writer.write(data)
        return await reader.read()

    return talk(talk_once)


def refusal(answer: bytes) -> tuple[int, str]:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"content-type: application/json" in head
    return int(head.split()[1]), json.loads(body)["error"]["type"]


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEADERS_WITHIN_S", 0.05)
    monkeypatch.setattr(connection, "MESSAGE_WITHIN_S", 0.05)


def test_headers_that_never_end_are_408(soon: None) -> None:
    assert refusal(send(b"")) == (408, "headers_late")
    assert refusal(send(b"GET / HTTP/1.1\r\nHost: x\r\nX-A: ")) == (408, "headers_late")
    assert refusal(send(b"\r\n\r\n")) == (408, "headers_late")


def test_a_header_section_beyond_the_limit_is_431() -> None:
    start = b"GET / HTTP/1.1\r\nHost: x\r\n"
    for headers in (b"X-A: " + b"a" * 40_000, b"a: b\r\n" * 101 + b"\r\n", b"X: %b\r\n" % (b"a" * 900) * 50):
        assert refusal(send(start + headers)) == (431, "headers_too_large")
    assert refusal(send(b"GET /" + b"a" * 40_000)) == (431, "headers_too_large")


@pytest.mark.parametrize(
    "request_",
    [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"CONNECT x:80 HTTP/1.1\r\nHost: x:80\r\n\r\n",
        b"CONNECT / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nGET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"no request\r\n\r\n",
    ],
)
def test_what_is_no_request_is_400(request_: bytes) -> None:
    assert refusal(send(request_)) == (400, "bad_http")


def test_a_body_that_is_no_body_is_400() -> None:
    """The waiting application must learn that the client has disconnected."""
    chunked = b"POST /wait HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert refusal(send(chunked + b"ZZ\r\n")) == (400, "bad_http")


@pytest.mark.parametrize(
    "then",
    [
        b"surplus\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 101 + b"\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
    ],
)
@pytest.mark.parametrize("num_before", [1, 3])
def test_what_follows_a_request_and_is_none_does_not_take_its_answer(num_before: int, then: bytes) -> None:
    """A body longer than its announced length used to close the connection without any answer."""
    good = b"POST /later HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nbody"
    answers = send(good * num_before + then)
    assert answers.count(b"HTTP/1.1 200") == answers.count(b"ok") == num_before
    assert answers.count(b"HTTP/1.1 ") == num_before


def test_a_refusal_of_a_large_body_arrives() -> None:
    """Reading used to pause for an application that took no data: the client hung, and then was reset."""

    async def send_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        writer.write(b"POST /wait HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        writer.write(b"%x\r\n" % 100_000 + bytes(100_000) + b"\r\nZZ\r\n")
        for _ in range(16):
            writer.write(bytes(64 << 10))
            await writer.drain()
        return await reader.read()

    assert refusal(talk(send_on)) == (400, "bad_http")


def test_nothing_is_written_after_a_refusal() -> None:
    """An application that asked for the body later used to get an exception about 100 Continue."""
    expects = b"Transfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\nZZ\r\n"
    received.clear()

    async def stay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        writer.write(b"POST /late HTTP/1.1\r\nHost: x\r\n" + expects)
        answer = await reader.read()
        while not received:
            await asyncio.sleep(0.001)
        return answer

    assert refusal(talk(stay)) == (400, "bad_http") and received == ["http.disconnect"]


def test_a_body_that_is_no_body_has_no_second_answer() -> None:
    """A proxy in front would take it for the answer to the next request."""

    async def answered_first(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        answer = await reader.readuntil(b"ok")
        writer.write(b"ZZ\r\n")
        return answer + await reader.read()

    assert talk(answered_first).count(b"HTTP/1.1 ") == 1


def test_a_client_that_leaves_ends_its_request_though_another_waits_behind_it() -> None:
    """Only a connection's last request used to be told; the one being served kept its slots to its end."""

    async def leave(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        paths = (b"wait", b"later")
        writer.writelines(b"GET /%b HTTP/1.1\r\nHost: x\r\n\r\n" % path for path in paths)
        await writer.drain()
        return b""

    talk(leave)  # waits for the end of all requests


def test_trailers_are_no_headers() -> None:
    """They used to arrive after all checks: a key that a front proxy had removed, or a second Host."""
    chunked = b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    answer = send(chunked + b"3\r\nabc\r\n0\r\nAuthorization: Bearer key\r\nHost: y\r\n\r\n")
    assert b"abc host transfer-encoding connection\n" in answer


def test_trailers_that_never_end_are_431() -> None:
    """The parser keeps them: 48 MiB of them used to take 93 MiB."""

    async def send_trailers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        chunked = b"Transfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n"
        writer.write(b"POST /wait HTTP/1.1\r\nHost: x\r\n" + chunked)
        await reader.readuntil(b"100 Continue\r\n\r\n")
        writer.write(b"0\r\nX-A: " + b"a" * 40_000)
        return await reader.read()

    assert refusal(talk(send_trailers)) == (431, "headers_too_large")


@pytest.mark.parametrize("at_once", [1, 1000])
def test_a_request_that_offers_an_upgrade_keeps_its_body(at_once: int) -> None:
    """Java's HttpClient offers h2c with each first request. Its body and what followed used to be dropped."""
    offer = b"Host: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n"
    post = b"POST /echo HTTP/1.1\r\n%bContent-Length: 3\r\n\r\nabc" % offer
    last = b"GET / HTTP/1.1\r\n%bConnection: close\r\n\r\n" % offer

    async def in_pieces(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        data = post * 2 + last
        for start in range(0, len(data), at_once):
            writer.write(data[start : start + at_once])
            await asyncio.sleep(0)
        return await reader.read()

    answers = talk(in_pieces)
    assert answers.count(b"abc host connection content-length\n") == 2 and answers.endswith(b"ok")


def test_a_body_that_never_ends_is_cut_off(soon: None) -> None:
    answer = send(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200")


def test_a_connection_is_kept_and_its_next_request_has_its_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEADERS_WITHIN_S", 0.3)
    get = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"

    async def two(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        answers = b""
        for _ in range(2):
            writer.write(get)
            answers += await reader.readuntil(b"ok")
        writer.write(get[:-2])
        return answers + await reader.read()

    first, second, third = talk(two).split(b"HTTP/1.1 ")[1:]
    assert first.startswith(b"200") and second.startswith(b"200") and third.startswith(b"408")


@pytest.mark.parametrize(
    "request_",
    [
        b"POST / HTTP/1.0\r\nContent-Length: %d\r\n\r\n" % (2 << 20),
        b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % (2 << 20),
        b"POST / HTTP/1.1\r\n\r\n",
    ],
)
def test_an_answer_before_the_end_of_a_body_arrives(request_: bytes) -> None:
    """The connection used to be reset; nginx, which uses HTTP/1.0 by default, made it a 502 of its own."""

    async def send_all(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        writer.write(request_)
        for _ in range(32):
            await asyncio.sleep(0.001)
            writer.write(bytes(64 << 10))
            await writer.drain()
        return await reader.read()

    assert talk(send_all).startswith(b"HTTP/1.1 ")


def test_a_body_that_comes_after_its_answer_is_read_slowly() -> None:
    """Clients whose uploads were refused used to make the proxy read 150 MiB a second for nothing."""
    num_bytes = 2 << 20
    began_s = time.monotonic()
    body = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % num_bytes + bytes(num_bytes)
    answers = send(body + b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert answers.count(b"HTTP/1.1 200 OK") == 2
    seconds = time.monotonic() - began_s
    assert seconds > (num_bytes / connection.DISCARDED_AT_ONCE - 2) * connection.DISCARD_PAUSE_S


def test_an_upgrade_is_answered_as_the_plain_request_that_it_also_is() -> None:
    websocket = b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade, close\r\n\r\n"
    assert send(websocket).startswith(b"HTTP/1.1 200")


def test_http_1_0_gets_a_stream_without_chunks() -> None:
    """HTTP/1.0 clients and proxies used to take the sizes of the chunks for a part of the answer."""
    head, _, body = send(b"GET /stream HTTP/1.0\r\n\r\n").partition(b"\r\n\r\n")
    assert body == b"one two" and b"transfer-encoding" not in head and b"connection: close" in head
    assert send(b"GET /stream HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").endswith(b"0\r\n\r\n")
    assert send(b"GET / HTTP/1.0\r\n\r\n").endswith(b"content-length: 2\r\nconnection: close\r\n\r\nok")
    head, _, body = send(b"HEAD /stream HTTP/1.0\r\n\r\n").partition(b"\r\n\r\n")
    assert body == b"" and b"200 OK" in head
