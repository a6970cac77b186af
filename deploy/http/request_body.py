"""Read the body of a request: a form, JSON or the bytes of an image, of bounded size, with nothing ignored.

A body becomes a pydantic model that names its fields. A thread parses it, so that a large body does not stop
the other requests. The bytes of images are untrusted. They are not inspected here; a child process decodes
them.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar
from urllib.parse import parse_qsl

from pydantic import BaseModel, ValidationError
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import Field, File, FormParser, parse_options_header
from starlette.requests import Request

from blip2_actor import FetchPolicy
from deploy.guard.uploads import MAX_COMMAS
from deploy.http.errors import bad_request, explain, shorten, unsupported_media_type
from deploy.http.images import MAX_IMAGES, URLENCODED, raw_image, refuse_size
from deploy.http.lanes import in_lane
from deploy.http.options import OPTION_NAMES

JSON = "application/json"
FORM = "multipart/form-data"
IMAGE = "image/*"
RAW = ("", "application/octet-stream", URLENCODED)
"""Content types of the bytes of an image, next to image/*; `curl --data-binary` sends the last one."""
FILE_FIELDS = ("image", "images", "pixels")
"""Fields that are files in a form."""
MAX_TEXT_BYTES = 1 << 20
"""Maximum size of everything in a body that is not an image."""
PLAIN_TEXTS = ("prompt", "model")
"""Fields that are plain text in a form or a query, where others are JSON."""
MAX_PARTS = 200
MAX_DEPTH = 64
"""Maximum depth of nested JSON lists and objects, over which everything after the parser may recurse."""

BodyT = TypeVar("BodyT", bound=BaseModel)


async def read_body(
    request: Request,
    body_type: type[BodyT],
    image_policy: FetchPolicy,
    max_bodies: int = 1,
    *,
    takes_json: bool = True,
) -> BodyT:
    """Read one call.

    Args:
        body_type: with a field of `FILE_FIELDS` it may be a form, and with `image` the bytes of an image.
        image_policy: maximum size of one image, and the hosts whose images are fetched.
        max_bodies: how many of the largest images fit into the body.
        takes_json: whether it may be JSON.

    Raises:
        ApiError: 400, 413 or 415; the message says what is wrong.
    """
    header = request.headers.get("content-type", "")
    media = header.partition(";")[0].strip().lower()
    fields = body_type.model_fields.keys()
    taken = {IMAGE: "image" in fields, FORM: bool(fields & {*FILE_FIELDS}), JSON: takes_json}
    is_raw, is_json = media in RAW or media.startswith("image/"), media == JSON
    if not taken.get(IMAGE if is_raw else media):
        *first, last = [kind for kind, is_taken in taken.items() if is_taken]
        kinds = f"{', '.join(first)} or {last}" if first else last
        raise unsupported_media_type(f"Content-Type must be {kinds}, got {media or 'none'!r}")
    max_bytes = image_policy.max_bytes * max_bodies * (4 / 3 if is_json else 1) + MAX_TEXT_BYTES
    body = await _read_bounded(request, int(max_bytes))

    def parse() -> BodyT:
        if is_raw:
            given: dict[str, Any] = {"image": raw_image(media, body)}
        else:
            given = _json_fields(body) if is_json else _form_fields(header, body, fields)
        in_query = _from_texts(_query_texts(request.url.query), fields)
        return validate(body_type, _with_query(given, in_query), image_policy)

    return await in_lane(len(body), parse)


def validate(body_type: type[BodyT], fields: Mapping[str, Any], image_policy: FetchPolicy) -> BodyT:
    """Return the fields of a call as a model; raise ApiError 400 that names the first wrong field."""
    given = dict(fields)
    try:
        return body_type.model_validate(given, context={"image_policy": image_policy})
    except ValidationError as error:
        known = body_type.model_fields
        options = OPTION_NAMES if "options" in known else ()
        raise bad_request(explain(error, given, known, options)) from None


async def _read_bounded(request: Request, max_bytes: int) -> bytes:
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > max_bytes:
        refuse_size("body", max_bytes, int(length))
    chunks: list[bytes] = []
    num_bytes = 0
    async for chunk in request.stream():
        chunks.append(chunk)
        num_bytes += len(chunk)
        if num_bytes > max_bytes:
            refuse_size("body", max_bytes, num_bytes)
    return b"".join(filter(None, chunks))  # copies nothing if there is one chunk, as from our front


# JSON ---------------------------------------------------------------------------------------------------


def _json_fields(body: bytes) -> dict[str, Any]:
    fields = parse_json("body", body)
    if not isinstance(fields, dict):
        raise bad_request(f"body must be a JSON object, got {shorten(fields)}")
    return fields


def parse_json(what: str, text: bytes | str) -> Any:
    """Parse JSON in UTF-8 whose texts are whole characters; raise ApiError 400 that says what is wrong."""
    num_commas = text.count(b"," if isinstance(text, bytes) else ",")  # type: ignore[arg-type]
    if num_commas > MAX_COMMAS:
        raise bad_request(f"{what} must have at most {MAX_COMMAS} commas, got {num_commas}")
    try:
        decoded = text.decode() if isinstance(text, bytes) else text
        value = json.loads(decoded, parse_constant=_refuse_constant, object_pairs_hook=_refuse_repeated)
        if re.search(r"\\u[dD][89a-fA-F]", decoded):  # there may be a lone surrogate
            json.dumps(value, ensure_ascii=False).encode()
        if decoded.count("[") + decoded.count("{") > MAX_DEPTH and _is_too_deep(value):
            raise RecursionError
    except UnicodeEncodeError:
        raise bad_request(f"{what} must consist of whole characters, got a lone surrogate") from None
    except UnicodeDecodeError:
        raise bad_request(f"{what} must be JSON in UTF-8") from None
    except json.JSONDecodeError as error:
        if isinstance(text, str):
            example = '5, true or ["red", "blue"]'
            raise bad_request(f"{what} must be JSON, such as {example}, got {shorten(text)}") from None
        raise bad_request(f"{what} must be JSON: {error}") from None
    except _NotJson as error:
        raise bad_request(f"{what} must be JSON: {error}") from None
    except ValueError:  # Python refuses integers with too many digits
        max_digits = sys.get_int_max_str_digits()
        raise bad_request(f"{what} must have integers of at most {max_digits} digits") from None
    except RecursionError:
        raise bad_request(f"{what} must have at most {MAX_DEPTH} lists or objects in one another") from None
    return value


class _NotJson(ValueError):
    """Something that Python's parser accepts, but JSON does not have."""


def _is_too_deep(value: object) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        inside = (
            one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list)
        )
        level = [part for parts in inside for part in parts]
    return any(isinstance(one, dict | list) for one in level)


def _refuse_constant(name: str) -> NoReturn:
    raise _NotJson(f"{name} is not a JSON number")


def _refuse_repeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        repeated, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise _NotJson(f"{shorten(repeated)} is given twice")
    return fields


# Forms --------------------------------------------------------------------------------------------------


@dataclass
class _Form:
    """What the parser of a form has found."""

    texts: list[tuple[bytes, bytes]] = field(default_factory=list)
    files: list[tuple[bytes, bytes]] = field(default_factory=list)
    is_complete: bool = False

    def add_field(self, part: Field) -> None:
        is_image = (part.content_type or "").lower().startswith("image/")
        self._add(self.files if is_image else self.texts, part.field_name, part.value)

    def add_file(self, part: File) -> None:
        part.file_object.seek(0)
        self._add(self.files, part.field_name, part.file_object.read())

    def end(self) -> None:
        self.is_complete = True

    def _add(self, parts: list[tuple[bytes, bytes]], name: bytes | None, value: bytes | None) -> None:
        parts.append((name or b"", value or b""))
        if len(self.texts) + len(self.files) > MAX_PARTS:
            raise bad_request(f"a form must have at most {MAX_PARTS} parts")


def _form_fields(content_type: str, body: bytes, known: Set[str]) -> dict[str, Any]:
    _, parameters = parse_options_header(content_type)
    if parameters.get(b"charset", b"utf-8").lower() not in (b"utf-8", b"utf8"):
        raise bad_request("a form must be in UTF-8; leave out charset")
    form = _Form()
    config = {"MAX_MEMORY_FILE_SIZE": len(body) + 1, "UPLOAD_ERROR_ON_BAD_CTE": True}
    try:
        parser = FormParser(
            FORM, form.add_field, form.add_file, form.end, parameters.get(b"boundary"), config=config
        )
        parser.write(body)
    except FormParserError as error:
        raise bad_request(f"body must be multipart/form-data: {error}") from None
    if not form.is_complete:
        raise bad_request("body must be multipart/form-data that ends with its boundary")
    fields: dict[str, Any] = {}
    for raw_name, image in form.files:
        _add_image(fields, _text("the name of a part", raw_name), image, known)
    texts = []
    for raw_name, text in form.texts:
        name = _text("the name of a part", raw_name)
        if name in FILE_FIELDS:
            raise bad_request(f'{name} must be a file, as curl sends with -F "{name}=@photo.jpg"')
        texts.append((name, _text(name, text)))
    return _merged(fields, _from_texts(texts, known))


def _add_image(fields: dict[str, Any], name: str, image: bytes, known: Set[str]) -> None:
    if name == "images" and name in known:
        fields.setdefault(name, []).append(image)
        if len(fields[name]) > MAX_IMAGES:
            raise bad_request(f"images must be at most {MAX_IMAGES} files")
    elif name in fields:
        raise bad_request(f"{name} must be given once")
    elif name in known and name not in (*FILE_FIELDS, "inputs"):
        raise bad_request(f"{name} must be text, got a file")
    else:
        fields[name] = image


def _text(what: str, value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise bad_request(f"{what} must be text in UTF-8") from None


# Texts of a form or a query ------------------------------------------------------------------------------


def _from_texts(texts: list[tuple[str, str]], known: Set[str]) -> dict[str, Any]:
    """Return the fields that stand in a form or in a query, where everything is text.

    `PLAIN_TEXTS` are plain text, and so is each `stop`, which may be repeated; everything else is JSON. Each
    option may stand under its own name.
    """
    fields: dict[str, Any] = {}
    options: dict[str, Any] = {}
    for name, text in texts:
        is_option = name in OPTION_NAMES and "options" in known
        place = options if is_option else fields
        if is_option and name == "stop":
            place.setdefault(name, []).append(text)
        elif name in place:
            raise bad_request(f"{name} must be given once")
        else:
            is_text = name in PLAIN_TEXTS or not text or not (is_option or name in known)
            place[name] = text if is_text else parse_json(name, text)
    return _merged(fields, {"options": options} if options else {})


def _merged(fields: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    for name in fields.keys() & others.keys():
        raise bad_request(f"{name} must be given once")
    return fields | others


def _with_query(fields: dict[str, Any], in_query: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a body and of a query; both may hold some of the options."""
    if all(isinstance(each.get("options"), dict) for each in (fields, in_query)):
        fields = fields | {"options": _merged(fields["options"], in_query.pop("options"))}
    return _merged(fields, in_query)


def _query_texts(query: str) -> list[tuple[str, str]]:
    try:
        return parse_qsl(query, keep_blank_values=True, errors="strict", max_num_fields=MAX_PARTS)
    except ValueError:  # UnicodeDecodeError too
        raise bad_request(f"the query must be text in UTF-8, with at most {MAX_PARTS} fields") from None
