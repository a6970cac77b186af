"""Several threads fetch a thousand images, good and bad: each gets its status and affects no other."""

from __future__ import annotations

import io
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
from PIL import Image

from blip2_actor import EngineConfig, FetchPolicy, Status
from tests.unit.fetching.web_server import Answer, web_server

NUM_URLS = 1000
NUM_CALLERS = 4


def picture(seed: int, format: str = "PNG") -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, format)
    return file.getvalue()


GOOD = {f"/good/{i}.{f.lower()}": picture(i, f) for i, f in enumerate(["PNG", "JPEG", "WEBP", "GIF", "BMP"])}
BAD: dict[str, tuple[Answer, Status]] = {
    "/none.png": (404, Status.FETCH_FAILED),
    "/busy.png": ((503, {"Retry-After": "1"}), Status.FETCH_FAILED),
    "/circle.png": ((302, {"Location": "/circle.png"}), Status.FETCH_FAILED),
    "/packed.png": ((200, {"Content-Encoding": "gzip"}), Status.FETCH_FAILED),
    "/private.png": ((302, {"Location": "http://10.0.0.1/a.png"}), Status.REFUSED),
    "/file.png": ((302, {"Location": "file:///etc/passwd"}), Status.REFUSED),
    "/empty.png": (b"", Status.MISSING_IMAGE),
    "/page.html": (b"<html>not an image</html>", Status.UNDECODABLE),
    "/cut.png": (picture(0)[:2000], Status.UNDECODABLE),
    "/moved.png": ((301, {"Location": "/good/0.png"}), Status.OK),
}


def test_a_thousand_urls(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = partial(FetchPolicy, private_hosts=("127.0.0.1",))
    monkeypatch.setattr("blip2_actor.inputs.image_input.FetchPolicy", policy)
    config = EngineConfig(
        model="demo", device="cpu", dtype="float32", num_threads=1, max_slots=8, allow_urls=True
    )
    answers: dict[str, Sequence[Answer]] = {path: [body] for path, body in GOOD.items()}
    answers |= {path: [answer] for path, (answer, _) in BAD.items()}
    paths = random.Random(0).choices([*GOOD, *BAD], k=NUM_URLS)
    with (
        config.build() as engine,
        web_server(answers) as site,
        ThreadPoolExecutor(NUM_CALLERS) as callers,
    ):
        texts = {path: engine.generate(body)[0].text for path, body in GOOD.items()}
        texts["/moved.png"] = texts["/good/0.png"]
        parts = [paths[i::NUM_CALLERS] for i in range(NUM_CALLERS)]
        calls = [callers.submit(engine.generate, [site.url + path for path in part]) for part in parts]
        for part, call in zip(parts, calls, strict=True):
            for path, result in zip(part, call.result(300), strict=True):
                expected = BAD[path][1] if path in BAD else Status.OK
                assert (result.status, result.text) == (expected, texts.get(path)), f"{path}: {result.error}"
        asked = site.num_requests
        assert asked.total() > NUM_URLS and all(asked[path] >= paths.count(path) for path in answers)
        assert engine.stats().num_running == engine.stats().num_waiting == 0
