"""Check the headers of a request before anything is parsed, and remove those that must not reach Serve."""

from __future__ import annotations

import re
import secrets
from collections import Counter
from collections.abc import Sequence

from python_multipart.multipart import parse_options_header

from deploy.http.errors import bad_request, unsupported_media_type

REQUEST_ID = b"x-request-id"
MAX_CONTENT_TYPE_BYTES = 1_024
"""Its parameters are parsed on the event loop of the proxy, where 32 kB of them took 50 ms."""

_SINGLE = {
    b"authorization",
    b"content-encoding",
    b"content-length",
    b"content-type",
    b"host",
    b"origin",
    b"transfer-encoding",
    REQUEST_ID,
}
_FOR_SERVE_ONLY = re.compile(
    rb"x[-_]request[-_](?!id$).*|(x[-_])?serve[-_].*|x[-_]session[-_]id|traceparent|tracestate"
)
"""Headers that steer Serve's proxy: its timeout, its watch for clients that leave, and its routing."""
_REQUEST_ID_VALUE = re.compile(rb"[A-Za-z0-9._:-]{1,128}")


def check_headers(headers: Sequence[tuple[bytes, bytes]]) -> None:
    """Refuse headers that are given twice, or that name an encoding that is not decoded here.

    Raises:
        ApiError: 400 or 415.
    """
    counts = Counter(name for name, _ in headers)
    for name in _SINGLE:
        if counts[name] > 1:
            raise bad_request(f"{name.decode()} must be given once, got {counts[name]} times")
    given = dict(headers)
    if not _REQUEST_ID_VALUE.fullmatch(given.get(REQUEST_ID, b"-")):
        raise bad_request("x-request-id must be at most 128 letters, digits and the characters . _ : -")
    encoding = given.get(b"content-encoding", b"identity").strip().lower()
    if encoding != b"identity":
        raise unsupported_media_type(
            f"Content-Encoding must be identity, got {_shown(encoding)}; send the plain bytes"
        )
    transfer = given.get(b"transfer-encoding", b"chunked").strip().lower()
    if transfer != b"chunked":
        raise unsupported_media_type(
            f"Transfer-Encoding must be chunked, got {_shown(transfer)}; send the plain bytes"
        )
    content_type = given.get(b"content-type", b"")
    if len(content_type) > MAX_CONTENT_TYPE_BYTES:
        raise bad_request(f"content-type must have at most {MAX_CONTENT_TYPE_BYTES} bytes")
    _, parameters = parse_options_header(content_type)
    charset = parameters.get(b"charset", b"utf-8").strip().lower()
    if charset not in (b"utf-8", b"utf8"):
        raise unsupported_media_type(f"the charset of Content-Type must be utf-8, got {_shown(charset)}")


def for_serve(headers: Sequence[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Return the headers without those that steer Serve's proxy, and with a request id."""
    kept = [(name, value) for name, value in headers if not _FOR_SERVE_ONLY.fullmatch(name)]
    if not any(name == REQUEST_ID for name, _ in kept):
        kept.append((REQUEST_ID, request_id_of(kept)))
    return kept


def request_id_of(headers: Sequence[tuple[bytes, bytes]]) -> bytes:
    """Return the request id that the client has given, or a new one if there is none or it is refused."""
    given = dict(headers).get(REQUEST_ID, b"")
    return given if _REQUEST_ID_VALUE.fullmatch(given) else secrets.token_hex(16).encode()


def _shown(value: bytes) -> str:
    return repr(value[:40].decode("latin-1"))
