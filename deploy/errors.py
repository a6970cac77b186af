"""What a caller is told when a request cannot be served: one JSON shape, one table of codes."""

from __future__ import annotations

from starlette.responses import JSONResponse

from blip2_actor import Status

RETRY_AFTER_S = 1

STATUS_CODES: dict[Status, int] = {
    Status.MISSING_IMAGE: 422,
    Status.UNDECODABLE: 422,
    Status.TOO_LARGE: 413,
    Status.DECODER_CRASHED: 422,
    Status.DECODER_TIMED_OUT: 422,
    Status.REFUSED: 422,
    Status.FAILED: 500,
}
"""HTTP code of every fate of an image but `OK`; the image is at fault, except for `FAILED`."""


class ApiError(Exception):
    """An answer that is not a caption; raised anywhere below the routes."""

    def __init__(self, code: int, type: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.type = type
        self.message = message

    def response(self) -> JSONResponse:
        """`{"error": {"type", "message"}}`, with Retry-After when trying again can help."""
        headers = {"Retry-After": str(RETRY_AFTER_S)} if self.code == 503 else None
        body = {"error": {"type": self.type, "message": self.message}}
        return JSONResponse(body, status_code=self.code, headers=headers)


def bad_request(message: str) -> ApiError:
    return ApiError(400, "bad_request", message)


def of_status(status: Status, error: str | None) -> ApiError:
    """The answer for an image that came to grief; its type is the status."""
    return ApiError(STATUS_CODES[status], status.value, error or f"the image ended as {status.value}")
