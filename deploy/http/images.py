"""Images in the fields of a request: base64, data URIs, URLs, or the bytes of a form."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NoReturn

from pydantic import BeforeValidator, GetCoreSchemaHandler, InstanceOf, ValidationInfo, WithJsonSchema

from blip2_actor import FetchPolicy
from deploy.http.errors import ApiError, bad_request, unsupported_media_type
from deploy.http.lanes import in_lane

URLENCODED = "application/x-www-form-urlencoded"
"""What curl says of a body, unless it is told otherwise."""
MAX_IMAGES = 64
"""Maximum number of images in one request."""
MAX_BODIES = 4
"""How many images of the largest size fit into one request with many images."""

_DATA_URI = re.compile(r"data:[\w.+/-]*(;[\w.+-]+=[^;,]*)*(;base64)?,", re.ASCII | re.IGNORECASE)
_URL = re.compile(r"\s*(https?|ftp|file|s3|gs):", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class ImageUrl:
    """An image that is fetched after its request is admitted."""

    field: str
    """The field of the request, for messages."""
    url: str

    @classmethod
    def __get_pydantic_core_schema__(cls, _: Any, handler: GetCoreSchemaHandler) -> Any:
        """Keep it out of the OpenAPI document: no body has it, because validators make it from texts."""
        return handler.generate_schema(Any)


ImageSource = bytes | ImageUrl
"""The encoded bytes of an image, or where they are."""


def _read_image(value: object, info: ValidationInfo) -> ImageSource:
    """Return the image in a field; raise ApiError 400 or 413, with the name of the field."""
    name = info.field_name or "image"
    policy = (info.context or {}).get("image_policy", FetchPolicy(hosts=()))
    if isinstance(value, str):
        return read_text(name, value, policy)
    if value is None:
        raise bad_request(f"{name} must be given")
    if not isinstance(value, bytes):
        raise bad_request(f"{name} must be a string: base64, a data URI or a URL")
    return _bounded(name, value, policy)


IMAGE_SCHEMA = WithJsonSchema(
    {
        "type": "string",
        "description": "The encoded image in base64, line breaks allowed, or a data URI; or an http or https "
        "URL, if the service fetches images from its host (--allow-image-host).",
    }
)
ImageField = Annotated[ImageSource, BeforeValidator(_read_image), IMAGE_SCHEMA]
"""A field with an image."""


def _read_or_refuse(value: object, info: ValidationInfo) -> ImageSource | ApiError:
    if not isinstance(value, str | bytes):  # the request itself is wrong, as its schema says
        raise bad_request(f"each of {info.field_name} must be a string: base64, a data URI or a URL")
    try:
        return _read_image(value, info)
    except ApiError as refusal:
        return refusal.with_traceback(None)


ImageOrRefusal = Annotated[
    InstanceOf[bytes] | InstanceOf[ImageUrl] | InstanceOf[ApiError],
    BeforeValidator(_read_or_refuse),
    IMAGE_SCHEMA,
]
"""One of several images; an error in it does not affect the others."""


def read_text(name: str, text: str, policy: FetchPolicy) -> ImageSource:
    """Return an image that is written as base64, a data URI or a URL; raise ApiError 400 or 413.

    Args:
        name: the field.
        policy: without hosts, URLs are refused.
    """
    if _URL.match(text):
        if not policy.hosts:
            raise ApiError(
                400,
                "url_refused",
                f"{name} must be the image itself, in base64 or as a data URI, got a URL, and this service "
                "fetches none",
            )
        return ImageUrl(field=name, url=text)
    return _bounded(name, _decode(name, text), policy)


async def read_texts(name: str, texts: Sequence[str], policy: FetchPolicy) -> list[ImageSource]:
    """Return images as `read_text` does, decoded in the lane for this many bytes."""
    names = [name] if len(texts) == 1 else [f"{name}.{index}" for index in range(len(texts))]
    return await in_lane(
        sum(map(len, texts)),
        lambda: [read_text(name, text, policy) for name, text in zip(names, texts, strict=True)],
    )


def _bounded(name: str, image: bytes, policy: FetchPolicy) -> bytes:
    if len(image) > policy.max_bytes:
        refuse_size(name, policy.max_bytes, len(image))
    return image


def _decode(name: str, text: str) -> bytes:
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


def raw_image(media: str, body: bytes) -> bytes:
    """Return a body that is an image by its content type.

    Raises:
        ApiError: 415; it is a form, JSON or what `curl -d` leaves of an image. Without a header, curl gives
            all of them the content type of `--data-binary`.
    """
    if re.match(rb"\s*[{\[]", body):
        raise unsupported_media_type("Content-Type must be application/json for JSON, as with curl -H")
    if media != URLENCODED or not body or b"\0" in body:  # every image has null bytes, and no form
        return body
    if re.match(rb"[\w.%+\[\]-]+=", body):
        raise unsupported_media_type(
            "Content-Type must be multipart/form-data for a form, as curl sends with -F; with --data-binary "
            "the body must be the bytes of an image"
        )
    raise unsupported_media_type(
        "body must be the bytes of an image, without a change; curl -d leaves out some: use "
        "--data-binary @photo.jpg, or -F image=@photo.jpg"
    )
