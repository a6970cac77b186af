"""Ask an endpoint for the captions of a sample of an output's images, and compare its answers with the rows.

The endpoint is reached by its documented interface alone, `GET /v1/model` and `POST /v1/caption`; it may run
anywhere. The output stores no token ids, so what is compared is the text, its number of tokens, and why it
ended.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

from blip2_actor import GenerationOptions
from pipeline.endpoint.client import Endpoint, EndpointError, read_key
from pipeline.finding import Finding
from pipeline.ledger.commit import Summary
from pipeline.ledger.run_record import Run
from pipeline.maintenance.sample import SampledRow, sample_rows
from pipeline.progress import count
from pipeline.storage.folder import Folder

COMPARED = ("caption", "captions", "num_tokens", "finish_reason")
"""Columns of the output that the answer has under the same names."""
NUM_AT_ONCE = 8
"""Requests at the same time, so that they share a batch, as rows do in a job."""


def connect(url: str, key_file: str | None, run: Run) -> Endpoint:
    """Return an endpoint that serves the model of a run.

    Raises:
        EndpointError: it cannot be reached, or serves another model or dtype.
        ValueError: the run has no captions, or the file with the key cannot be read.
    """
    if not run.settings.get("outputs", {}).get("caption", True):
        raise ValueError("url must be left out for a run without captions")
    endpoint = Endpoint(url, read_key("key_file", key_file))
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
