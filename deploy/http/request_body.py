"""Read the body of `POST /v1/caption`: multipart or JSON, of bounded size, with nothing ignored.

The bytes of the image are untrusted. They are not inspected here; a child process decodes them.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import AsyncGenerator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NoReturn, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from blip2_actor import GenerationOptions
from deploy.http.errors import ApiError, bad_request

FIELDS = ("image", "prompt", "options")
MAX_OPTIONS = {"max_new_tokens": 512, "num_beams": 16, "num_return_sequences": 16}
"""What one caller may ask of a shared engine; more would crowd out the other requests."""
MAX_TEXT_CHARS = 8_192
"""Maximum length of a prompt; the model's own limit, in tokens, is lower."""

_OPTION_TYPES: dict[str, TypeAdapter[Any]] = {
    name: TypeAdapter(hint, config=ConfigDict(strict=True, allow_inf_nan=False))
    for name, hint in get_type_hints(GenerationOptions).items()
}


@dataclass(frozen=True, kw_only=True, eq=False)
class CaptionCall:
    """One request, with the service's options filled in."""

    image: bytes
    prompt: str | None
    options: GenerationOptions


async def read_call(request: Request, defaults: GenerationOptions, max_image_bytes: int) -> CaptionCall:
    """Read one call; options that are not given are taken from `defaults`.

    Raises:
        ApiError: 400, 413 or 415; the message says what is wrong.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type == "application/json":
        body = await _read_bounded(request, max_image_bytes * 4 // 3 + 64 * 1024)
        fields = _json_fields(body)
    elif content_type == "multipart/form-data":
        body = await _read_bounded(request, max_image_bytes + 64 * 1024)
        fields = await _form_fields(request.headers, body)
    else:
        raise ApiError(
            415,
            "unsupported_media_type",
            f"Content-Type must be multipart/form-data or application/json, got {content_type or 'none'!r}",
        )
    return _call(fields, defaults, max_image_bytes)


def parse_options(given: object, defaults: GenerationOptions) -> GenerationOptions:
    """Return the service's options with those of the caller in their place.

    Raises:
        ApiError: 400; an option is unknown, of the wrong type, out of range or without effect.
    """
    if not isinstance(given, dict):
        raise bad_request(f"options must be a JSON object, got {_short(given)}")
    values = {name: _option(name, value) for name, value in given.items()}
    try:
        return GenerationOptions(**values).resolve(asdict(defaults))
    except ValueError as error:
        raise bad_request(f"options: {error}") from None


async def _read_bounded(request: Request, max_bytes: int) -> bytes:
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > max_bytes:
        _refuse_size("body", max_bytes, int(length))
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            _refuse_size("body", max_bytes, len(body))
    return bytes(body)


def _json_fields(body: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise bad_request(f"body must be JSON: {error}") from None
    if not isinstance(fields, dict):
        raise bad_request(f"body must be a JSON object, got {_short(fields)}")
    image = fields.get("image")
    if image is not None:
        if not isinstance(image, str):
            raise bad_request("image must be a string in base64")
        try:
            fields["image"] = base64.b64decode(image, validate=True)
        except (binascii.Error, ValueError):
            raise bad_request("image must be base64 without line breaks or a data: prefix") from None
    return fields


async def _form_fields(headers: Headers, body: bytes) -> dict[str, Any]:
    async def stream() -> AsyncGenerator[bytes, None]:
        yield body
        yield b""

    parser = MultiPartParser(headers, stream(), max_files=1, max_fields=len(FIELDS))
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError) as error:
        raise bad_request(f"body must be multipart/form-data: {error}") from None
    fields: dict[str, Any] = {}
    for name, value in form.multi_items():
        if name in fields:
            raise bad_request(f"{name} must be given once")
        fields[name] = await value.read() if isinstance(value, UploadFile) else value
    await form.close()
    if isinstance(fields.get("image"), str):
        raise bad_request('image must be a file, as curl sends with -F "image=@photo.jpg"')
    if fields.get("options") is not None:
        try:
            fields["options"] = json.loads(fields["options"], parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise bad_request(f"options must be JSON: {error}") from None
    return fields


def _call(fields: Mapping[str, Any], defaults: GenerationOptions, max_image_bytes: int) -> CaptionCall:
    for name in fields:
        if name not in FIELDS:
            raise bad_request(f"{name} is not a field; the fields are {', '.join(FIELDS)}")
    image, prompt, options = (fields.get(name) for name in FIELDS)
    if image is None:
        raise bad_request("image must be given")
    if len(image) > max_image_bytes:
        _refuse_size("image", max_image_bytes, len(image))
    if prompt is not None and not isinstance(prompt, str):
        raise bad_request("prompt must be a string")
    if prompt is not None and len(prompt) > MAX_TEXT_CHARS:
        raise bad_request(f"prompt must have at most {MAX_TEXT_CHARS} characters, got {len(prompt)}")
    return CaptionCall(image=image, prompt=prompt or None, options=parse_options(options or {}, defaults))


def _option(name: str, value: object) -> Any:
    if name not in _OPTION_TYPES:
        raise bad_request(f"{name} is not an option; the options are {', '.join(_OPTION_TYPES)}")
    try:
        # Through JSON, in which a list is accepted for a tuple.
        parsed = _OPTION_TYPES[name].validate_json(json.dumps(value))
    except ValidationError as error:
        rule = error.errors()[0]["msg"].removeprefix("Input should be ")
        raise bad_request(f"options: {name} must be {rule}, got {_short(value)}") from None
    if name in MAX_OPTIONS and parsed > MAX_OPTIONS[name]:
        raise bad_request(f"options: {name} must be at most {MAX_OPTIONS[name]}, got {parsed}")
    if name == "stop" and (len(parsed) > 8 or any(len(text) > 64 for text in parsed)):
        raise bad_request("options: stop must be at most 8 strings of at most 64 characters")
    return parsed


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _refuse_size(what: str, max_bytes: int, num_bytes: int) -> NoReturn:
    raise ApiError(413, "too_large", f"{what} must have at most {max_bytes} bytes, got {num_bytes}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
