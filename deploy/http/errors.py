"""The answer to a request that cannot be served: one JSON shape, one table of codes."""

from __future__ import annotations

import math
from collections.abc import Mapping

from starlette.responses import JSONResponse

from blip2_actor import Status

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


def bad_request(message: str) -> ApiError:
    return ApiError(400, "bad_request", message)


BEING_SERVED = "requests are being served"
"""In the message of `full`, by which the front knows it."""


def overloaded(message: str, retry_after_s: float = RETRY_AFTER_S) -> ApiError:
    """Return the 503 of a service that has too much to do."""
    return _try_again("overloaded", message, retry_after_s)


def full(num_in_flight: int, retry_after_s: float) -> ApiError:
    """Return the 503 of a gateway that has all the requests that it takes."""
    return overloaded(f"{num_in_flight} {BEING_SERVED}", retry_after_s)


def unavailable(message: str) -> ApiError:
    """Return the 503 of a service that has lost, replaces or starts one of its parts."""
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
