"""The answer to a request that cannot be served: one JSON shape, one table of codes, and the wrong field."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from starlette.responses import JSONResponse

from blip2_actor import Status
from blip2_actor.flags import did_you_mean

RETRY_AFTER_S = 1
"""Seconds until another try when nothing better is known."""

STATUS_CODES = {Status.TOO_LARGE: 413, Status.FAILED: 500}
"""HTTP codes by row status. The code of every other status is 422: the image, or what was asked of it, is
at fault."""


class ApiError(Exception):
    """An answer that is not a caption; raised anywhere below the routes."""

    def __init__(
        self,
        code: int,
        type: str,
        message: str,
        *,
        retry_after_s: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Describe the answer.

        Args:
            code: HTTP status code; 429 is the quota of this caller, 503 the service.
            type: stable name of the error.
            message: one sentence for a person.
            retry_after_s: seconds until another try can succeed; only 429 and 503 say so.
            headers: further headers of the answer.
        """
        super().__init__(message)
        self.code = code
        self.type = type
        self.message = message
        self.headers = dict(headers or {})
        if code in (429, 503):
            self.headers["Retry-After"] = str(math.ceil(retry_after_s or RETRY_AFTER_S))

    @property
    def document(self) -> dict[str, dict[str, str | None]]:
        """`{"error": {"type", "message", "param", "code"}}`, the shape of OpenAI's errors.

        `code` repeats the type, and `param` is null.
        """
        return {"error": {"type": self.type, "message": self.message, "param": None, "code": self.type}}

    def response(self) -> JSONResponse:
        """Return the document, with Retry-After when another try can help."""
        return JSONResponse(self.document, status_code=self.code, headers=self.headers)


MAX_MESSAGE_CHARS = 600
"""Names of fields come from the client, and are as long as it likes."""


def bad_request(message: str) -> ApiError:
    if len(message) > MAX_MESSAGE_CHARS:
        half = MAX_MESSAGE_CHARS // 2
        message = f"{message[:half]} ... {message[-half:]}"
    return ApiError(400, "bad_request", message)


def unsupported_media_type(message: str) -> ApiError:
    return ApiError(415, "unsupported_media_type", message)


BEING_SERVED = "requests are being served"
"""Part of the message of `full`, by which the front recognizes it."""


def overloaded(message: str, retry_after_s: float = RETRY_AFTER_S) -> ApiError:
    """Return the 503 of a service that has too much to do."""
    return _try_again("overloaded", message, retry_after_s)


def full(num_in_flight: int, retry_after_s: float) -> ApiError:
    """Return the 503 of a gateway that can take no more requests."""
    return overloaded(f"{num_in_flight} {BEING_SERVED}", retry_after_s)


def unavailable(message: str) -> ApiError:
    """Return the 503 of a service that has lost a part of itself, replaces it or starts it."""
    return _try_again("unavailable", message, RETRY_AFTER_S)


def not_ready(message: str) -> ApiError:
    """Return the 503 of a probe."""
    return _try_again("not_ready", message, RETRY_AFTER_S)


def _try_again(type: str, message: str, after_s: float) -> ApiError:
    return ApiError(503, type, f"{message}; try again in {math.ceil(after_s)} s", retry_after_s=after_s)


def of_status(status: Status, error: str | None) -> ApiError:
    """Return the answer for an image that has no caption; its type is the status."""
    return ApiError(
        STATUS_CODES.get(status, 422), status.value, error or f"the image has the status {status.value}"
    )


def shorten(value: object) -> str:
    """Return a value for a message, without the bytes of an image."""
    text = f"{len(value)} bytes" if isinstance(value, bytes) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


# Wrong fields -------------------------------------------------------------------------------------------

_UNKNOWN = "extra_forbidden"
"""pydantic's name for a field that does not exist."""
MAX_NAME_CHARS = 64
"""Maximum length of an unknown field's name for which the nearest known one is looked for."""
MAX_EXPLAINED = 1_000
"""Maximum number of errors of one body that are searched for the one to explain: 5 ms."""


def explain(
    error: ValidationError, given: Mapping[str, Any], known: Iterable[str], options: Sequence[str]
) -> str:
    """Return what is wrong with the first wrong field of a body.

    Args:
        given: the body that was validated.
        known: the fields of a body.
        options: the options that may stand in one of them, `options`.
    """
    num_wrong = error.error_count()
    if num_wrong > MAX_EXPLAINED:
        return f"body must have known fields and values of the right types, got {num_wrong} that are wrong"
    all_errors = error.errors(include_url=False, include_context=False)
    errors = _meant([(_place(one, given), one) for one in all_errors])
    # A misspelled name is the reason why another is missing. If a field takes several kinds of values,
    # explain the kind that is most alike: the one whose error lies deepest, or is not about its type.
    unknown = [(place, one) for place, one in errors if one["type"] == _UNKNOWN]
    alike = unknown or [(place, one) for place, one in errors if place[:1] == errors[0][0][:1]]
    place, wrong = max(alike, key=lambda found: (len(found[0]), not found[1]["type"].endswith("_type")))
    path = ".".join(map(str, place))
    if unknown:
        return _unknown_field(path, list(known), options) if len(place) == 1 else f"{path} is not a field"
    if wrong["type"] == "missing":
        return f"{path} must be given"
    if wrong["type"] == "union_tag_not_found":  # of a part of a message
        return f"{path}.type must be given"
    if wrong["type"].startswith(("value_error", "union_tag")):
        return f"{path}: {re.sub('^(Value error, |Input )', '', wrong['msg'])}"
    rule = re.sub(r"^(Input|String|List|Dictionary) should | after validation", "", wrong["msg"])
    rule = re.sub(r" or (instance of|object to) .*", "", rule)
    return f"{path} must {rule}, got {shorten(wrong['input'])}"


def _unknown_field(name: str, known: list[str], options: Sequence[str]) -> str:
    if name in options:  # only forms and queries may give options by their own names
        return f"{name} must stand in options in JSON"
    said = f"{name} is not a field; the fields are {', '.join(known)}"
    return said + did_you_mean(name[:MAX_NAME_CHARS], [*known, *options])


_Place = tuple[int | str, ...]
_Errors = list[tuple[_Place, Any]]


def _meant(errors: _Errors) -> _Errors:
    """Leave out the errors of kinds of values that lack a given field which another kind has."""
    known = {place for place, one in errors if one["type"] != _UNKNOWN}
    unknown_of: dict[_Place, dict[_Place, set[_Place]]] = {}  # by the value, then by its kind
    for place, one in errors:
        if one["type"] in (_UNKNOWN, "missing"):
            unknown = unknown_of.setdefault(place[:-1], {}).setdefault(one["loc"][:-1], set())
            if one["type"] == _UNKNOWN:
                unknown.add(place)
    others: set[_Place] = set()
    for kinds in unknown_of.values():
        unknown_to_all = frozenset.intersection(*map(frozenset, kinds.values()))
        others |= {kind for kind, unknown in kinds.items() if unknown & known or unknown - unknown_to_all}
    return [(place, one) for place, one in errors if one["loc"][:-1] not in others] or errors


def _place(error: Any, given: object) -> _Place:
    """Return where a value is in a body, without pydantic's names for kinds of values."""
    if error["type"] == "missing":
        *outer, name = error["loc"]
        return (*(_way(given, outer, error["input"]) or ()), name)
    found = _way(given, error["loc"], error["input"])
    return error["loc"][:1] if found is None else found  # the name of an item is no value


def _way(value: Any, parts: Sequence[Any], wrong: object) -> _Place | None:
    """Return those of the parts of a location that lead to the wrong value."""
    if not parts:
        return () if value is wrong else None
    part, *rest = parts
    is_index = isinstance(value, list) and isinstance(part, int) and part < len(value)
    if is_index or (isinstance(value, dict) and part in value):
        found = _way(value[part], rest, wrong)
        if found is not None:
            return (part, *found)
    return _way(value, rest, wrong)
