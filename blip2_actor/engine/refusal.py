"""Why a request is refused before it reaches the device."""

from __future__ import annotations

from blip2_actor.status import Status


class RequestRefused(ValueError):
    """The request cannot be served; `status` says which kind of problem, the message says why."""

    def __init__(self, status: Status, message: str) -> None:
        super().__init__(message)
        self.status = status
