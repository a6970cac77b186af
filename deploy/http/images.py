"""Images in the fields of a request: base64, data URIs, or the bytes of a form."""

from __future__ import annotations

import base64
import binascii
import re
from typing import Annotated, NoReturn

from pydantic import BeforeValidator, ValidationInfo, WithJsonSchema

from deploy.http.errors import ApiError, bad_request

MAX_IMAGES = 64
"""Maximum number of images in one request."""

_DATA_URI = re.compile(r"data:[\w.+/-]*(;[\w.+-]+=[^;,]*)*(;base64)?,", re.ASCII | re.IGNORECASE)


def _read_image(value: object, info: ValidationInfo) -> bytes:
    """Return the bytes of an image; raise ApiError 400 or 413, with the name of the field."""
    name = info.field_name or "image"
    if isinstance(value, bytes):
        image = value
    elif isinstance(value, str):
        image = decode_text(name, value)
    elif value is None:
        raise bad_request(f"{name} must be given")
    else:
        raise bad_request(f"{name} must be a string in base64, or a data URI")
    limit = (info.context or {}).get("max_image_bytes", len(image))
    if len(image) > limit:
        refuse_size(name, limit, len(image))
    return image


ImageBytes = Annotated[
    bytes,
    BeforeValidator(_read_image),
    WithJsonSchema(
        {
            "type": "string",
            "contentEncoding": "base64",
            "description": "The encoded image in base64, line breaks allowed, or a data URI.",
        }
    ),
]
"""A field with an image."""


def decode_text(name: str, text: str) -> bytes:
    """Return the bytes of an image that is written as base64 or as a data URI; raise ApiError 400."""
    if re.match(r"\s*(https?|ftp|file|s3|gs):", text, re.IGNORECASE):
        raise ApiError(
            400,
            "url_refused",
            f"{name} must be the image itself, in base64 or as a data URI, got a URL, and this service "
            "fetches none",
        )
    if text[:5].lower() == "data:":
        uri = _DATA_URI.match(text[:1000])
        if uri is None or uri[2] is None:
            raise bad_request(f"{name} must be a data URI in base64, such as data:image/jpeg;base64,...")
        text = text[uri.end() :]
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise bad_request(f"{name} must be base64 or a data URI, got characters that are neither") from None


def refuse_size(what: str, max_bytes: int, num_bytes: int) -> NoReturn:
    raise ApiError(413, "too_large", f"{what} must have at most {max_bytes} bytes, got {num_bytes}")
