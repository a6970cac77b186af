"""Images that are written as text: base64, alone or in a data URI."""

from __future__ import annotations

import base64
import binascii
import re

from pipeline.inputs.image_kinds import HEAD_BYTES, looks_like_image

HEAD_CHARS = 128
"""How much of a text `looks_like_base64_image` needs."""

_DATA_URI = re.compile(rb"\s*data:[\w.+/-]*(?:;[\w.+-]+=[^;,]*)*(;base64)?,", re.ASCII | re.IGNORECASE)
_CHARS_OF_HEAD = -(-HEAD_BYTES // 3) * 4
_BASE64 = re.compile(rb"[A-Za-z0-9+/_-]{%d}" % _CHARS_OF_HEAD)


def decode_base64(text: bytes) -> bytes:
    """Decode base64 with line breaks or without, in its usual or its URL-safe letters, or a data URI.

    Raises:
        ValueError: the text is neither.
    """
    uri = _DATA_URI.match(text[:1000])
    if uri is not None:
        if uri[1] is None:
            raise ValueError("the data URI is not in base64")
        text = text[uri.end() :]
    compact = b"".join(text.split()).translate(bytes.maketrans(b"-_", b"+/"))
    try:
        return base64.b64decode(compact + b"=" * (-len(compact) % 4), validate=True)
    except binascii.Error as error:
        raise ValueError(f"the text is neither base64 nor a data URI: {error}") from None


def looks_like_base64_image(head: bytes) -> bool:
    """Return whether a text is a data URI or the base64 of an image, by its first `HEAD_CHARS` characters."""
    if _DATA_URI.match(head):
        return True
    first = b"".join(head.split())[:_CHARS_OF_HEAD]
    return bool(_BASE64.fullmatch(first)) and looks_like_image(decode_base64(first))
