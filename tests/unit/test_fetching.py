"""The guard for URLs: public addresses only, and no server can fill the memory or hold the caller."""

from __future__ import annotations

import gzip
import ipaddress
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from blip2_actor import FetchError, FetchPolicy, Status, fetch_image

LOOPBACK = FetchPolicy(allow_networks=("127.0.0.0/8",), timeout_s=10.0)
Answer = Callable[[socket.socket, bytes], None]


@contextmanager
def server(answer: Answer) -> Iterator[str]:
    """Answer each request on a loopback port; yields the URL."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                with connection:
                    try:
                        answer(connection, connection.recv(65536))
                    except OSError:  # the client has left
                        pass

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join(10)


def plain(body: bytes, status: str = "200 OK", **headers: str) -> Answer:
    lines = [f"HTTP/1.1 {status}", "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return lambda connection, _: connection.sendall("\r\n".join([*lines, "", ""]).encode() + body)


def redirect(url: str) -> Answer:
    return plain(b"", "302 Found", Location=url, Content_Length="0")


def refused(url: str, policy: FetchPolicy = FetchPolicy()) -> FetchError:
    with pytest.raises(FetchError) as raised:
        fetch_image(url, policy)
    assert str(raised.value).isprintable() and len(str(raised.value)) < 400
    return raised.value


def test_an_image_is_fetched_under_its_own_name() -> None:
    requests: list[bytes] = []

    def answer(connection: socket.socket, request: bytes) -> None:
        requests.append(request)
        plain(b"the image", Content_Length="9")(connection, request)

    with server(answer) as url:
        assert fetch_image(f"{url}/a%20b/ü.jpg?w=1&h=é#part", LOOPBACK) == b"the image"
    request = requests[0].decode()
    assert request.startswith("GET /a%20b/%C3%BC.jpg?w=1&h=%C3%A9 HTTP/1.1\r\n")
    assert f"Host: {url.removeprefix('http://')}\r\n" in request
    assert "Accept-Encoding: identity" in request


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.1",
        "2130706433",
        "0x7f.0.0.1",
        "0",
        "[::1]",
        "[::]",
        "[::ffff:127.0.0.1]",
        "[64:ff9b::7f00:1]",
        "[2002:7f00:1::]",
        "[fe80::1]",
        "[fec0::1]",
        "[fd00:ec2::254]",
        "[ff02::1]",
        "localhost",
        "LOCALHOST.",
        "10.0.0.1",
        "172.16.0.1",
        "192.168.1.1",
        "100.100.100.200",
        "169.254.169.254",
        "168.63.129.16",
        "192.0.0.192",
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
    ],
)
def test_no_address_of_this_machine_or_its_network_is_reached(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However it is written; the metadata services of all large clouds are among them."""
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("it connected"))
    error = refused(f"http://{host}/")
    assert error.reason == "address" and error.status is Status.REFUSED


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_public_addresses_are_allowed(address: str) -> None:
    assert FetchPolicy().allows(ipaddress.ip_address(address))


def test_only_the_networks_that_are_allowed_are_reached() -> None:
    policy = FetchPolicy(allow_networks=("10.1.0.0/16", "::1/128"))
    assert [policy.allows(ipaddress.ip_address(a)) for a in ("10.1.2.3", "10.2.0.1", "::1", "127.0.0.1")] == [
        True,
        False,
        True,
        False,
    ]


def test_a_private_host_is_reached_by_its_name_alone() -> None:
    """Neither another name of the same address, nor another host to which it redirects."""
    policy = FetchPolicy(private_hosts=("127.0.0.1",), timeout_s=10.0)
    with server(plain(b"image")) as url:
        assert fetch_image(url, policy) == b"image"
        other = url.replace("127.0.0.1", "localhost")
        assert refused(other, policy).reason == "address"
        with server(redirect(other)) as redirecting:
            assert refused(redirecting, policy).reason == "address"


def test_a_failure_says_whether_another_try_may_help() -> None:
    """And how long the server wants the client to wait, as a number or as a date."""
    for status, is_transient in ((404, False), (403, False), (429, True), (500, True), (503, True)):
        with server(plain(b"", f"{status} No", Retry_After="7")) as url:
            error = refused(url, LOOPBACK)
        assert (error.http_status, error.is_transient, error.retry_after_s) == (status, is_transient, 7.0)
    with server(plain(b"", "503 No", Retry_After="Wed, 21 Oct 2015 07:28:00 GMT")) as url:
        assert refused(url, LOOPBACK).retry_after_s == 0.0
    endless = "Mon, 01 Jan 99999999999999999999 00:00:00 +0000"
    for wrong in ("soon", "-1", "Wed, 99 Oct", endless):
        with server(plain(b"", "503 No", Retry_After=wrong)) as url:
            assert refused(url, LOOPBACK).retry_after_s is None
    assert refused(url, LOOPBACK).is_transient  # nothing listens any longer
    assert not refused("http://10.0.0.1/").is_transient


@pytest.mark.parametrize("addresses", [["127.0.0.1"], ["8.8.8.8", "127.0.0.1"]])
def test_a_name_that_resolves_to_a_private_address_is_refused(
    addresses: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also beside a public one: an attacker answers with both, and waits for the second to be tried."""

    def resolve(host: str, port: int, **_: Any) -> list[Any]:
        found = addresses if host == "evil.example" else [host]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in found]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    error = refused("http://evil.example/a.jpg")
    assert error.reason == "address" and str(error).endswith("got evil.example, which is 127.0.0.1")
    assert str(refused("http://127.0.0.1/a.jpg")).endswith("must lead to a public address, got 127.0.0.1")


def test_the_connection_goes_to_the_address_that_was_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that resolves to something else the second time (DNS rebinding) gains nothing."""
    asked: list[str] = []

    with server(plain(b"image")) as url:
        port = int(url.rpartition(":")[2])
        real = socket.getaddrinfo

        def resolve(host: str | bytes, *arguments: Any, **options: Any) -> list[Any]:
            asked.append(host if isinstance(host, str) else host.decode())
            return real("127.0.0.1" if asked[-1] == "name.example" else host, *arguments, **options)

        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        assert fetch_image(f"http://name.example:{port}/", LOOPBACK) == b"image"
    assert [host for host in asked if host != "127.0.0.1"] == ["name.example"]


@pytest.mark.parametrize(
    "target", ["http://169.254.169.254/latest/meta-data/", "//localhost/", "http://[::1]:80/"]
)
def test_a_redirect_to_a_private_address_is_refused(target: str) -> None:
    with server(redirect(target)) as url:
        assert refused(url, FetchPolicy(allow_networks=("127.0.0.1/32", "0.0.0.0/32"))).reason in (
            "address",
            "connection",  # `localhost` is 127.0.0.1, where nothing listens on port 80
        )


def test_a_redirect_to_another_scheme_or_host_is_refused() -> None:
    for target, reason in (
        ("file:///etc/passwd", "url"),
        ("http://[", "url"),
        ("http://other.example/", "host"),
    ):
        with server(redirect(target)) as url:
            policy = FetchPolicy(hosts=("127.0.0.1",), allow_networks=("127.0.0.0/8",))
            assert refused(url, policy).reason == reason


def test_a_host_with_other_letters_can_be_allowed() -> None:
    """The name in the URL was encoded and the one in the policy was not."""
    policy = FetchPolicy(hosts=("Bücher.invalid.",))
    assert policy.hosts == ("xn--bcher-kva.invalid",)
    assert refused("http://bücher.invalid/", policy).reason == "connection"
    assert refused("http://xn--bcher-kva.invalid/", policy).reason == "connection"


def test_redirects_are_followed_up_to_a_number() -> None:
    def answer(connection: socket.socket, request: bytes) -> None:
        step = int(request.split()[1].removeprefix(b"/"))
        (redirect(f"/{step - 1}") if step else plain(b"image"))(connection, request)

    with server(answer) as url:
        assert fetch_image(f"{url}/5", LOOPBACK) == b"image"
        assert refused(f"{url}/6", LOOPBACK).reason == "redirects"


@pytest.mark.parametrize("headers", [{"Content_Length": "1000000000000"}, {}])
def test_a_body_beyond_the_limit_is_not_read(headers: dict[str, str]) -> None:
    """Whether the server says so before, or goes on sending."""

    def answer(connection: socket.socket, request: bytes) -> None:
        plain(b"", **headers)(connection, request)
        while True:
            connection.sendall(bytes(1 << 16))

    with server(answer) as url:
        policy = FetchPolicy(allow_networks=("127.0.0.0/8",), max_bytes=1 << 20)
        error = refused(url, policy)
    assert error.reason == "size" and error.status is Status.TOO_LARGE


def test_a_compressed_body_is_refused() -> None:
    """A gzip bomb is a thousand times larger than what travels."""
    bomb = gzip.compress(bytes(10 << 20))
    with server(plain(bomb, Content_Encoding="gzip", Content_Length=str(len(bomb)))) as url:
        assert refused(url, LOOPBACK).reason == "answer"


@pytest.mark.parametrize("part", ["nothing", "headers", "body"])
def test_a_server_that_drips_does_not_hold_the_caller(part: str) -> None:
    """Each byte arrives in time, the whole never does."""
    left = threading.Event()

    def answer(connection: socket.socket, request: bytes) -> None:
        if part == "body":
            plain(b"", Content_Length="100000")(connection, request)
        else:
            connection.sendall(b"HTTP/1.1 200 OK\r\nA: " if part == "headers" else b"")
        while not left.wait(0.02):
            if part != "nothing":
                connection.sendall(b"x")

    with server(answer) as url:
        started = time.monotonic()
        error = refused(url, FetchPolicy(allow_networks=("127.0.0.0/8",), timeout_s=0.2))
        took_s = time.monotonic() - started
        left.set()
    assert error.reason == "time" and error.status is Status.FETCH_FAILED
    assert took_s < 5


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/\ud800.jpg",
        "http://example.com/?\ud800",
        "",
        "a.jpg",
        "ftp://example.com/a",
        "file:///etc/passwd",
        "http://",
        "http:///a",
        "http://user:password@example.com/",
        "http://exa mple.com/",
        "http://example.com\\@127.0.0.1/",
        "http://example.com:99999/",
        "http://[::1/",
        "http://" + "a" * 300 + ".com/",
        "http://a..b/",
        "http://a\ud800.com/",
    ],
)
def test_what_is_no_plain_url_is_refused_by_name(url: str) -> None:
    error = refused(url)
    assert error.reason == "url" and error.status is Status.REFUSED


def test_other_answers_have_a_status_of_their_own() -> None:
    for answer, reason in (
        (plain(b"", "404 Not Found"), "answer"),
        (plain(b"", "206 Partial Content"), "answer"),
        (plain(b"", "302 Found"), "answer"),
        (plain(b"short", Content_Length="100"), "connection"),
        (lambda connection, _: connection.sendall(b"\x00garbage\r\n\r\n"), "connection"),
        (lambda connection, _: None, "connection"),
    ):
        with server(answer) as url:
            error = refused(url, LOOPBACK)
            assert error.reason == reason and error.status is Status.FETCH_FAILED
    assert refused(url, LOOPBACK).reason == "connection"  # nothing listens any longer
    assert refused("http://name.invalid/").reason == "connection"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"allow_networks": ("10.0.0.1/8",)}, "allow_networks must be networks"),
        ({"max_bytes": 0}, "max_bytes must be above 0"),
        ({"timeout_s": float("inf")}, "timeout_s must be above 0 and finite"),
        ({"max_redirects": -1}, "max_redirects must be at least 0"),
        ({"hosts": "example.com"}, "hosts must be texts or None, got 'example.com'"),  # a text has letters
        ({"allow_networks": "10.0.0.0/8"}, "allow_networks must be texts, got '10.0.0.0/8'"),
        ({"max_bytes": "1"}, "max_bytes must be a whole number, got '1'"),
    ],
)
def test_a_policy_names_the_field_that_is_wrong(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FetchPolicy(**settings)
