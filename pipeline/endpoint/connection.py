"""Requests for batch work over a connection that stays open, and their answers line by line."""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable, Generator

from pipeline.endpoint.batch_requests import Outcome, outcome_of
from pipeline.endpoint.client import Endpoint, error_in, pause_s, reason_of

SILENT_S = 60.0
"""The endpoint sends an empty line each second; after this long without one, it is gone."""

MALFORMED = (ValueError, TypeError, AttributeError, LookupError, EOFError)
"""Exceptions of reading a line that is not an outcome."""


class WorkRefused(Exception):
    """The endpoint has answered with another code than 200."""

    def __init__(self, code: int, type: str, message: str, pause: float) -> None:
        super().__init__(f"answers {code}: {message}")
        self.code, self.type, self.pause_s = code, type, pause


class BrokenOff(Exception):
    """An answer ended before its last part."""

    def __init__(self, reason: str, type: str = "") -> None:
        """
        Args:
            type: the error type that the endpoint gives; "unavailable" and "timeout" are orderly ends.
        """
        super().__init__(reason)
        self.type = type


class Connection:
    """A connection that stays open between requests."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._connection: http.client.HTTPConnection | None = None

    def outcomes(
        self, kind: str, body: bytes, number: int, on_admitted: Callable[[], None]
    ) -> Generator[tuple[int, Outcome] | None, None, None]:
        """Send a request, and yield positions and outcomes; yield None while the endpoint works on it.

        Args:
            kind: the content type.
            number: number of outcomes.
            on_admitted: called when the endpoint has taken the request.

        Raises:
            OSError, HTTPException: the endpoint cannot be reached.
            WorkRefused: it takes no such request, or none now.
            BrokenOff: the answer began and ended early.
        """
        response = self._post(kind, body)
        if response.status != 200:
            content = response.read()
            pause = pause_s(response.headers.get("Retry-After"))
            kind_of_error = str(error_in(content).get("type", ""))
            raise WorkRefused(response.status, kind_of_error, reason_of(response, content), pause)
        on_admitted()
        try:
            for line in response:
                if not line.strip():
                    yield None
                    continue
                found = json.loads(line)
                if "index" not in found:
                    raise BrokenOff(str(found["error"]), found["status"])
                if found["index"] not in range(number):
                    raise BrokenOff(f"has sent an outcome with the index {found['index']!r}, of {number}")
                yield found["index"], outcome_of(found)
        except (OSError, http.client.HTTPException, *MALFORMED) as error:
            raise BrokenOff(f"has broken its answer off: {error!r}") from error
        finally:
            if not response.isclosed():
                self.close()

    def _post(self, kind: str, body: bytes) -> http.client.HTTPResponse:
        """Send a request; an open connection that the endpoint has closed meanwhile is opened again."""
        is_kept = self._connection is not None
        connection = self._connection = self._connection or self._endpoint.connect(SILENT_S)
        headers = {"Content-Type": kind, **self._endpoint.headers}
        try:
            connection.request("POST", self._endpoint.target("/v1/batch"), body, headers)
            return connection.getresponse()
        except (OSError, http.client.HTTPException):
            self.close()
            if not is_kept:
                raise
            return self._post(kind, body)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
