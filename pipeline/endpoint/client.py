"""One endpoint over HTTP: what its model is, and single captions. `sender` sends batch work."""

from __future__ import annotations

import base64
import dataclasses
import http.client
import json
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from blip2_actor import ModelInfo
from blip2_actor.flags import split_uri
from pipeline.storage.secrets import without_secrets

ANSWER_S = 120.0
"""How long one answer may take, and how long a busy endpoint is asked again."""
CONNECT_S = 10.0
MAX_PAUSE_S = 30.0


class EndpointError(ValueError):
    """The endpoint cannot be used, or has refused a request; the message says why."""


@dataclass(frozen=True)
class Endpoint:
    """An endpoint of this project."""

    url: str
    key: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        split_uri("endpoint", self.url)
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"endpoint must begin with http:// or https://, got {self.url}")
        if without_secrets(self.url) != self.url:
            raise ValueError(
                f"endpoint must hold no password and no option, got one in {without_secrets(self.url)}; "
                "give its key in a file"
            )

    @property
    def headers(self) -> dict[str, str]:
        """Headers of every request."""
        return {} if self.key is None else {"Authorization": f"Bearer {self.key}"}

    def model(self) -> dict[str, Any]:
        """Return the endpoint's description of its model; raise EndpointError if it gives none."""
        return self._ask("/v1/model", None, CONNECT_S)

    def model_info(self) -> ModelInfo:
        """Return the model of the endpoint; raise EndpointError if it says nothing."""
        said = self.model()
        names = {each.name for each in dataclasses.fields(ModelInfo)}
        try:
            return ModelInfo(**{name: value for name, value in said.items() if name in names})
        except TypeError:
            raise EndpointError(
                f"{self.url} is no endpoint of this project: it does not say its model"
            ) from None

    def caption(self, image: bytes, prompt: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return the endpoint's answer for one image."""
        body: dict[str, Any] = {"image": base64.b64encode(image).decode(), "options": options}
        return self._ask("/v1/caption", body if prompt is None else body | {"prompt": prompt}, ANSWER_S)

    def connect(self, timeout_s: float) -> http.client.HTTPConnection:
        """Return a connection, which opens with its first request.

        It goes through no proxy, whatever the environment names: images and key are for the endpoint alone.
        """
        parts = urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        return kind(parts.netloc, timeout=timeout_s)

    def target(self, path: str) -> str:
        """Return what a request for a path of the endpoint names."""
        return urlsplit(self.url).path.rstrip("/") + path

    def _ask(self, path: str, body: dict[str, Any] | None, timeout_s: float) -> dict[str, Any]:
        """Send one request, again while the endpoint has too much to do."""
        method, content, headers = "GET", None, self.headers
        if body is not None:
            method, content = "POST", json.dumps(body).encode()
            headers |= {"Content-Type": "application/json"}
        give_up_at = time.monotonic() + timeout_s
        while True:
            try:
                with closing(self.connect(timeout_s)) as connection:
                    connection.request(method, self.target(path), content, headers)
                    response = connection.getresponse()
                    answered = response.read()
                is_done = 200 <= response.status < 300
                answer = json.loads(answered) if is_done else None
            except (OSError, ValueError, http.client.HTTPException) as error:
                raise EndpointError(f"{self.url} gives no answer: {error}") from None
            if is_done:
                if not isinstance(answer, dict):
                    raise EndpointError(
                        f"{self.url} is no endpoint of this project: {path} is no JSON object"
                    )
                return answer
            pause = pause_s(response.headers.get("Retry-After"))
            if response.status not in (429, 503) or time.monotonic() + pause > give_up_at:
                reason = reason_of(response, answered)
                if response.status == 401:
                    reason += "; give a key of this endpoint in a file"
                elif response.status == 404 and self.target("").endswith("/v1"):
                    reason += "; leave out /v1, which the routes have themselves"
                raise EndpointError(f"{self.url} answers {response.status}: {reason}")
            time.sleep(pause)


def read_key(name: str, key_file: str | None) -> str | None:
    """Return the key in a file, given by its path or URI; None without one.

    Args:
        name: of the setting, for errors.

    Raises:
        ValueError: the file cannot be read.
    """
    from pipeline.storage.retrying_file import read_file  # --help does not need pyarrow

    return None if key_file is None else read_file(name, key_file).decode().strip()


def pause_s(retry_after: str | None) -> float:
    """Return the seconds to wait, as an endpoint asks; a proxy in front of it may write a date instead.

    They are bounded: a job that stops waits for the end of a pause.
    """
    asked = float(retry_after) if retry_after is not None and retry_after.isdecimal() else 1.0
    return min(asked, MAX_PAUSE_S)


def reason_of(response: http.client.HTTPResponse, content: bytes) -> str:
    """Return why an answer refuses a request: the sentence in it, or what its status says."""
    place = response.headers.get("Location")
    if place is not None and 300 <= response.status < 400:
        return f"a redirect to {place}, which is not followed; name that address"
    return str(error_in(content).get("message", "")) or response.reason


def error_in(content: bytes) -> Mapping[str, Any]:
    """Return the error that an answer holds; empty if it is none of this project."""
    try:
        error = json.loads(content)["error"]
    except (ValueError, KeyError, TypeError):
        return {}
    return error if isinstance(error, dict) else {}
