"""The answer to a request that cannot be served: one JSON shape, one table of codes."""

from __future__ import annotations

from starlette.responses import JSONResponse

from blip2_actor import Status

RETRY_AFTER_S = 1

STATUS_CODES = {Status.TOO_LARGE: 413, Status.FAILED: 500}
"""HTTP codes by row status. The code of every other status is 422: the image, or what was asked of it, is
at fault."""


class ApiError(Exception):
    """An answer that is not a caption; raised anywhere below the routes."""

    def __init__(self, code: int, type: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.type = type
        self.message = message

    def response(self) -> JSONResponse:
        """Return `{"error": {"type", "message"}}`, with Retry-After when another try can help."""
        headers = {"Retry-After": str(RETRY_AFTER_S)} if self.code == 503 else None
        body = {"error": {"type": self.type, "message": self.message}}
        return JSONResponse(body, status_code=self.code, headers=headers)


def bad_request(message: str) -> ApiError:
    return ApiError(400, "bad_request", message)


def of_status(status: Status, error: str | None) -> ApiError:
    """Return the answer for an image that has no caption; its type is the status."""
    return ApiError(
        STATUS_CODES.get(status, 422), status.value, error or f"the image has the status {status.value}"
    )
