"""The bytes that pass between a decoding child and its parent.

    parent → child    per image a uint64 length, then that number of encoded bytes
    child → parent    once hello, when it has started, then one reply per image, in the same order

The parent does not trust the child, which decodes untrusted bytes: replies are plain structs, and every field
is checked.
"""

from __future__ import annotations

import json
import struct
from dataclasses import asdict

from blip2_actor.preprocessing.images import DecodedImage
from blip2_actor.preprocessing.sandbox.protections import SandboxReport
from blip2_actor.status import Status

REQUEST = struct.Struct("<Q")
OUT_OF_MEMORY = 76
"""Exit status of a child whose image needed more memory than `memory_bytes`."""

_HELLO = struct.Struct("<H")
"""Bytes of the report on the sandbox, which follows as JSON."""
_REPLY = struct.Struct("<B?IIHI")
"""Index into _STATUSES, is_truncated, width, height (0 if unknown), bytes of UTF-8 error, bytes of pixels;
both follow."""
_STATUSES = tuple(Status)


class BadReply(Exception):
    """The child has sent bytes that are no message: its memory is damaged, or it is another program."""


def pack_hello(sandbox: SandboxReport) -> bytes:
    """Return what a child sends once, after its imports, when its sandbox is closed.

    A child that dies before it has a broken installation, not a bad image. It has not read a byte of an image
    yet, so the report can be trusted.
    """
    report = json.dumps(asdict(sandbox)).encode()
    return _HELLO.pack(len(report)) + report


def unpack_hello(received: bytearray) -> tuple[SandboxReport | None, int]:
    """Return the report on the sandbox and the length of the message, or None and 0 if it is not complete.

    Raises:
        BadReply: the message is something else.
    """
    if len(received) < _HELLO.size:
        return None, 0
    end = _HELLO.size + _HELLO.unpack_from(received)[0]
    if len(received) < end:
        return None, 0
    try:
        report = json.loads(received[_HELLO.size : end])
        return SandboxReport(**{name: tuple(values) for name, values in report.items()}), end
    except (AttributeError, TypeError, ValueError) as error:
        raise BadReply from error


def pack_reply(image: DecodedImage) -> bytes:
    """Return the reply of a child for one image."""
    error = (image.error or "").encode()
    pixels = image.pixels or b""
    header = _REPLY.pack(
        _STATUSES.index(image.status),
        image.is_truncated,
        image.width or 0,
        image.height or 0,
        len(error),
        len(pixels),
    )
    return b"".join((header, error, pixels))


def unpack_reply(received: memoryview, start: int, num_pixel_bytes: int) -> tuple[DecodedImage, int] | None:
    """Read the reply at `start` of the received bytes.

    Args:
        num_pixel_bytes: number of bytes of an image at the model's size.

    Returns:
        The image and the position after its reply, or None if the reply is not complete yet.

    Raises:
        BadReply: its status or its length is impossible.
    """
    if len(received) < start + _REPLY.size:
        return None
    status, is_truncated, width, height, num_error_bytes, num_pixels = _REPLY.unpack_from(received, start)
    is_ok = status == _STATUSES.index(Status.OK)
    if status >= len(_STATUSES) or num_pixels != (num_pixel_bytes if is_ok else 0):
        raise BadReply
    error_start = start + _REPLY.size
    pixels_start = error_start + num_error_bytes
    end = pixels_start + num_pixels
    if len(received) < end:
        return None
    image = DecodedImage(
        status=_STATUSES[status],
        error=str(received[error_start:pixels_start], "utf-8", "replace") or None,
        pixels=bytes(received[pixels_start:end]) or None,
        width=width or None,
        height=height or None,
        is_truncated=is_truncated,
    )
    return image, end
