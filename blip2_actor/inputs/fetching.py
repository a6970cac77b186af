"""Fetch images from URLs that others chose: one guard for the engine, the batch job and the endpoint.

A URL may name this machine, its network or the metadata service of its cloud, also through a redirect or a
name that resolves to such an address. So each host is resolved here, its addresses are checked, and the
connection goes to an address that was checked, never to the name again. Size, time and redirects are bounded.
Proxies from the environment are not used, because they would resolve the name a second time.
"""

from __future__ import annotations

import ipaddress
import re
import socket
import ssl
import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

import httpcore

from blip2_actor.inputs.addresses import is_address, plain_host
from blip2_actor.inputs.fetch_policy import FetchError, FetchPolicy
from blip2_actor.version import __version__

_HOST = re.compile(r"[a-z0-9_]([a-z0-9_.-]*[a-z0-9_.])?")
_REDIRECTS = (301, 302, 303, 307, 308)
_MAX_ERROR_CHARS = 200


def fetch_image(url: str, policy: FetchPolicy = FetchPolicy()) -> bytes:
    """Return the bytes behind an http or https URL; they are not yet checked to be an image. Thread-safe.

    Raises:
        FetchError: the policy does not allow it, or the server does not deliver.
    """
    connector = _Connector(policy, time.monotonic() + policy.timeout_s)
    with httpcore.ConnectionPool(_ssl_context(), network_backend=connector) as pool:
        try:
            for _ in range(policy.max_redirects + 1):
                body_or_url = _get(pool, _parse(url, policy), connector)
                if isinstance(body_or_url, bytes):
                    return body_or_url
                url = _redirected(url, body_or_url)
        except httpcore.TimeoutException as error:
            raise connector.too_slow() from error
        except (httpcore.NetworkError, httpcore.ProtocolError, OSError) as error:
            reason = " ".join(str(error).split())[:_MAX_ERROR_CHARS] or type(error).__name__
            raise FetchError("connection", f"the server cannot be reached: {reason}") from error
    raise FetchError("redirects", f"the URL redirects more than {policy.max_redirects} times")


def _redirected(url: str, location: str) -> str:
    try:
        return urljoin(url, location)
    except ValueError as error:
        raise FetchError("url", f"the URL must redirect to a valid one: {error}") from error


def _parse(url: str, policy: FetchPolicy) -> httpcore.URL:
    """Take a URL apart once, so that nothing after this reads it in another way."""
    try:
        parts = urlsplit(url.strip())
        host, port = plain_host(parts.hostname or ""), parts.port
        target = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
        if parts.query:
            target += "?" + quote(parts.query, safe="/?%:@!$&'()*+,;=~-._[]|")
    except (ValueError, UnicodeError) as error:
        raise FetchError(
            "url", f"the URL must be valid, got one with a damaged host, port, path or query: {error}"
        ) from error
    if parts.scheme not in ("http", "https"):
        raise FetchError("url", f"the URL must begin with http:// or https://, got {parts.scheme[:20]!r}")
    if "@" in parts.netloc:
        raise FetchError("url", "the URL must not contain a user or a password")
    if not (_HOST.fullmatch(host) or is_address(host)):
        raise FetchError("url", "the URL must name a host")
    if policy.hosts is not None and host not in policy.hosts:
        raise FetchError("host", f"the URL must be of an allowed host, got {host}")
    return httpcore.URL(scheme=parts.scheme, host=host, port=port, target=target)


def _get(pool: httpcore.ConnectionPool, url: httpcore.URL, connector: _Connector) -> bytes | str:
    """Return the body, or the URL of a redirect."""
    host = url.host.decode()
    headers: dict[bytes | str, bytes | str] = {
        "Host": (f"[{host}]" if ":" in host else host) + (f":{url.port}" if url.port else ""),
        "User-Agent": f"blip2-ray/{__version__}",
        "Accept": "image/*, */*;q=0.1",
        "Accept-Encoding": "identity",
    }
    with pool.stream("GET", url, headers=headers) as response:
        answered = {name.lower(): value.decode("latin-1") for name, value in response.headers}
        if response.status in _REDIRECTS and b"location" in answered:
            return answered[b"location"]
        if response.status != 200:
            raise FetchError(
                "answer",
                f"the server answered with status {response.status}, not with an image",
                response.status,
                _retry_after_s(answered),
            )
        if answered.get(b"content-encoding", "identity").strip().lower() not in ("", "identity"):
            raise FetchError("answer", "the server compressed the body, although it was asked not to")
        return _read(response, answered.get(b"content-length", ""), connector)


def _retry_after_s(headers: Mapping[bytes, str]) -> float | None:
    """Return the seconds that a server asks its client to wait; it writes a number or a date."""
    text = headers.get(b"retry-after", "").strip()
    if text.isdecimal():
        return float(text[:9])
    try:
        return max(0.0, (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError, OverflowError):  # no date, or one without a time zone
        return None


def _read(response: httpcore.Response, content_length: str, connector: _Connector) -> bytes:
    max_bytes = connector.policy.max_bytes
    if content_length.isdecimal() and int(content_length[:20]) > max_bytes:
        raise FetchError(
            "size", f"the image has {content_length[:20]} bytes, more than max_bytes ({max_bytes})"
        )
    body = bytearray()
    for chunk in response.iter_stream():
        body += chunk
        if len(body) > max_bytes:
            raise FetchError("size", f"the image has more bytes than max_bytes ({max_bytes})")
    return bytes(body)


class _Connector(httpcore.NetworkBackend):
    """Connects to addresses that were checked, and to nothing after the deadline."""

    def __init__(self, policy: FetchPolicy, deadline: float) -> None:
        self.policy = policy
        self._deadline = deadline
        self._sockets = httpcore.SyncBackend()

    def remaining_s(self) -> float:
        if (remaining := self._deadline - time.monotonic()) <= 0:
            raise self.too_slow()
        return remaining

    def too_slow(self) -> FetchError:
        return FetchError("time", f"the image did not arrive within {self.policy.timeout_s:g} s")

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        error: Exception | None = None
        for address in self._resolve(host, port):
            try:
                stream = self._sockets.connect_tcp(
                    address, port, self.remaining_s(), local_address, socket_options
                )
                return _Stream(stream, self)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as failure:
                error = failure  # the next address may answer
        assert error is not None  # `_resolve` returns at least one address
        raise error

    def _resolve(self, host: str, port: int) -> list[str]:
        """Return the addresses of a host, all of which are allowed."""
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = list(dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in found))
        if host in self.policy.private_hosts:
            return addresses
        for address in addresses:
            if not self.policy.allows(ipaddress.ip_address(address)):
                got = host if host == address else f"{host}, which is {address}"
                raise FetchError("address", f"the URL must lead to a public address, got {got}")
        return addresses


class _Stream(httpcore.NetworkStream):
    """A connection that ends at the deadline, however slowly its bytes drip."""

    def __init__(self, stream: httpcore.NetworkStream, connector: _Connector) -> None:
        self._stream = stream
        self._connector = connector

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, self._connector.remaining_s())

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, self._connector.remaining_s())

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        remaining_s = self._connector.remaining_s()
        return _Stream(self._stream.start_tls(ssl_context, server_hostname, remaining_s), self._connector)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


@cache
def _ssl_context() -> ssl.SSLContext:
    return ssl.create_default_context()
