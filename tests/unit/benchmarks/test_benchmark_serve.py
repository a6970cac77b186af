"""The benchmark of the endpoint: the requests that it sends, and its summary of the answers."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import psutil
import pytest
from starlette.datastructures import UploadFile
from starlette.requests import Request

from benchmarks.serve.comparison import ENDPOINT, compare
from benchmarks.serve.load import BOUNDARY, STREAM, Answer, _form, summary
from benchmarks.serve.processes import cpu_s_by_name, pss_bytes_by_name


def test_a_form_has_the_image_and_the_further_fields() -> None:
    body = _form(b"\x89PNG\r\n--", STREAM)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def read() -> tuple[object, bytes]:
        kind = f"multipart/form-data; boundary={BOUNDARY}".encode()
        request = Request({"type": "http", "headers": [(b"content-type", kind)]}, receive)
        async with request.form() as form:
            image = form["image"]
            assert isinstance(image, UploadFile)
            return form["stream"], await image.read()

    assert asyncio.run(read()) == ("true", b"\x89PNG\r\n--")


def test_the_first_piece_and_the_refusals_have_latencies_of_their_own() -> None:
    """A quick refusal must not make captions look fast, nor a broken connection look like a refusal."""
    answers = [
        Answer(0, 3, None, begun=1),
        Answer(0, 0.5, "503", begun=0.5),
        Answer(0, 9, "ServerDisconnectedError"),
    ]
    found = summary(answers, until=3)
    assert (found["first_p50_ms"], found["p99_ms"], found["refused_p99_ms"]) == (1000, 3000, 500)
    assert found["errors"] == {"503": 1, "ServerDisconnectedError": 1}


def test_the_endpoint_is_compared_with_the_best_batch_size_of_each_figure() -> None:
    def run(per_s: float, p99_ms: float) -> dict[str, Any]:
        return {"per_s": per_s, "p50_ms": p99_ms, "p99_ms": p99_ms, "errors": {}, "refused_p99_ms": None}

    sides = {ENDPOINT: run(30, 60), "serve.batch(1)": run(10, 90), "serve.batch(64)": run(20, 300)}
    found = compare([{"16 callers": sides}], "16 callers")["endpoint_over_best"]
    assert found == pytest.approx({"per_s": 1.5, "p50_ms": 2 / 3, "p99_ms": 2 / 3})


def test_memory_and_cpu_time_are_those_of_the_processes_by_name() -> None:
    here = psutil.Process()
    [used_s] = [used for name, used in cpu_s_by_name(here).items() if name.endswith(f" {os.getpid()}")]
    [held_bytes] = [
        held for name, held in pss_bytes_by_name(here).items() if name.endswith(f" {os.getpid()}")
    ]
    assert used_s > 0 and 1 << 20 < held_bytes <= here.memory_info().rss
