"""Ask an endpoint for the captions of a sample of an output's images, and compare its answers with the rows.

The endpoint is reached by its documented interface alone, `GET /v1/model` and `POST /v1/caption`; it may run
anywhere. The output stores no token ids, so what is compared is the text, its number of tokens, and why it
ended.
"""

from __future__ import annotations

import base64
import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from blip2_actor import GenerationOptions
from pipeline.finding import Finding
from pipeline.ledger.commit import Summary
from pipeline.ledger.run_record import Run
from pipeline.maintenance.sample import SampledRow, sample_rows
from pipeline.progress import count
from pipeline.storage.folder import Folder

COMPARED = ("caption", "captions", "num_tokens", "finish_reason")
"""Columns of the output that the answer has under the same names."""
ANSWER_S = 120.0
"""How long one answer may take, and how long an endpoint that has too much to do is asked again."""
CONNECT_S = 10.0
NUM_AT_ONCE = 8
"""Requests at the same time, so that they share a batch, as rows do in a job."""


class EndpointError(ValueError):
    """The endpoint cannot be used, or has refused a request; the message says why."""


@dataclass(frozen=True)
class Endpoint:
    """An endpoint of this project."""

    url: str
    key: str | None = None

    def model(self) -> dict[str, Any]:
        """Return what the endpoint says of its model; raise EndpointError if it says nothing."""
        return self._ask("/v1/model", None, CONNECT_S)

    def caption(self, image: bytes, prompt: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return the endpoint's answer for one image."""
        body: dict[str, Any] = {"image": base64.b64encode(image).decode(), "options": options}
        return self._ask("/v1/caption", body if prompt is None else body | {"prompt": prompt}, ANSWER_S)

    def _ask(self, path: str, body: dict[str, Any] | None, timeout_s: float) -> dict[str, Any]:
        """Send one request, again while the endpoint has too much to do."""
        request = urllib.request.Request(f"{self.url.rstrip('/')}{path}")
        if body is not None:
            request.data = json.dumps(body).encode()
            request.add_header("Content-Type", "application/json")
        if self.key is not None:
            request.add_unredirected_header("Authorization", f"Bearer {self.key}")
        give_up_at = time.monotonic() + timeout_s
        while True:
            try:
                with urllib.request.urlopen(request, timeout=timeout_s) as response:
                    answer = json.load(response)
            except urllib.error.HTTPError as error:
                pause_s = _pause_s(error.headers.get("Retry-After"))
                if error.code not in (429, 503) or time.monotonic() + pause_s > give_up_at:
                    raise EndpointError(f"{self.url} answers {error.code}: {_reason(error)}") from None
                time.sleep(pause_s)
            except (OSError, ValueError, http.client.HTTPException) as error:
                raise EndpointError(f"{self.url} gives no answer: {error}") from None
            else:
                if not isinstance(answer, dict):
                    raise EndpointError(
                        f"{self.url} is no endpoint of this project: {path} is no JSON object"
                    )
                return answer


def connect(url: str, key_file: str | None, run: Run) -> Endpoint:
    """Return an endpoint that serves the model of a run.

    Raises:
        EndpointError: it cannot be reached, or serves another model or dtype.
        ValueError: the run has no captions.
        OSError: the file with the key cannot be read.
    """
    if not run.settings.get("outputs", {}).get("caption", True):
        raise ValueError("url must be left out for a run without captions")
    key = None
    if key_file is not None:
        with open(key_file, encoding="utf-8") as file:
            key = file.read().strip()
    endpoint = Endpoint(url, key)
    model, parts = endpoint.model(), run.fingerprint.parts
    wanted = {"digest": parts.get("model"), "dtype": parts.get("dtype")}
    wanted["image_size_px"] = parts.get("image", {}).get("size_px")
    wrong = [
        f"{name} {model.get(name)} instead of {value}"
        for name, value in wanted.items()
        if model.get(name) != value
    ]
    if wrong:
        raise EndpointError(
            f"url must be an endpoint with the model of the run, got {url} with {', '.join(wrong)}; "
            "serve the same --model and --dtype"
        )
    return endpoint


def compare_with_endpoint(
    endpoint: Endpoint, folder: Folder, run: Run, summaries: Mapping[str, Summary], size: int
) -> Iterator[Finding]:
    """Yield the rows of a sample that the endpoint captions differently, and how many are the same.

    Args:
        summaries: what the footers of the finished shards say, by shard.
        size: maximum number of rows.
    """
    options = asdict(GenerationOptions(**run.fingerprint.parts["options"]).resolve())
    num_same = num_other = 0
    with ThreadPoolExecutor(NUM_AT_ONCE) as pool:
        rows = list(sample_rows(folder, run, summaries, size))
        answers = pool.map(lambda row: _difference(endpoint, row, options), rows)
        for row, difference in zip(rows, answers, strict=True):
            if row.problem is not None:
                yield Finding(row.name, "warn", row.problem, "restore the input to compare this row")
            elif difference is None:
                num_same += 1
            else:
                num_other += 1
                remedy = "compare settings and image limits; in bfloat16 near-ties may fall either way"
                yield Finding(row.name, "fail", difference, remedy)
    asked = num_same + num_other
    yield Finding("endpoint", "ok", f"{num_same:,} of {count(asked, 'caption')} are those of {endpoint.url}")


def _difference(endpoint: Endpoint, row: SampledRow, options: Mapping[str, Any]) -> str | None:
    """Return how the endpoint's answer differs from a row, or None."""
    if row.image is None:
        return None
    try:
        answer = endpoint.caption(row.image, row.prompt, options)
    except EndpointError as error:
        return str(error)
    for name in COMPARED:
        if name in row.columns and row.columns[name] != answer.get(name):
            return f"{name} is {row.columns[name]!r}, and {endpoint.url} answers {answer.get(name)!r}"
    return None


def _pause_s(retry_after: str | None) -> float:
    """Return the seconds that an endpoint asks to wait; a proxy in front of it may write a date instead."""
    return float(retry_after) if retry_after is not None and retry_after.isdecimal() else 1.0


def _reason(error: urllib.error.HTTPError) -> str:
    """Return the sentence in the answer of an endpoint, or the reason in HTTP's words."""
    try:
        return str(json.load(error)["error"]["message"])
    except (ValueError, KeyError, TypeError, OSError):
        return error.reason
