"""Under load for minutes, the memory, threads and open files of the endpoint's parts stay flat.

BLIP2_SOAK_S is the duration in seconds after the warm-up, 600 by default.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from operator import sub
from pathlib import Path

import httpx
import psutil
import pytest

from tests.chaos.own_clusters.online.test_endpoint_lifecycle import CAPTION, PNG, endpoint
from tests.processes import descendant

SOAK_S = float(os.environ.get("BLIP2_SOAK_S", "600"))
WARM_UP_S = min(60.0, SOAK_S / 3)
pytestmark = pytest.mark.timeout(SOAK_S + WARM_UP_S + 300)

NUM_CALLERS = 4
PARTS = ("ServeReplica:blip2:Gateway", "ServeReplica:blip2:Captioner", "ProxyActor")
MAX_GROWTH_BYTES = 64 << 20
"""Allowed growth of a part from the soak's first third to its last; a leak of 10 kB a request exceeds it."""
MAX_MORE = 8
"""Allowed growth in threads or open files of a part, because connections and pools come and go."""
Sample = tuple[float, int, int]
"""Bytes, threads and open files of each part."""


def use(url: str, client: httpx.Client, number: int) -> None:
    """Send a request of a kind that would leak something if it were served wrongly."""
    kind = random.Random(number).choice(("caption", "caption", "stream", "broken", "left", "models"))
    files = {"image": PNG}
    if kind == "caption":
        assert client.post(f"{url}/v1/caption", files=files).json()["caption"] == CAPTION
    elif kind == "stream":
        with client.stream("POST", f"{url}/v1/caption", files=files, data={"stream": "true"}) as answer:
            assert b"event: answer" in answer.read()
    elif kind == "broken":
        assert client.post(f"{url}/v1/caption", files={"image": PNG[:500]}).status_code == 422
    elif kind == "left":
        with pytest.raises(httpx.TimeoutException):
            client.post(f"{url}/v1/caption", files=files, data={"num_beams": "5"}, timeout=0.005)
    else:
        assert client.get(f"{url}/v1/models").status_code == 200


def samples_of(parts: dict[str, psutil.Process], until: Callable[[], bool]) -> dict[str, list[Sample]]:
    found: dict[str, list[Sample]] = {name: [] for name in parts}
    while not until():
        for name, part in parts.items():
            found[name].append((part.memory_full_info().uss, part.num_threads(), part.num_fds()))
        time.sleep(1)
    return found


def test_memory_threads_and_files_stay_flat(tmp_path: Path) -> None:
    with endpoint(tmp_path) as (url, command), ThreadPoolExecutor(NUM_CALLERS) as callers:
        stop, num_used = threading.Event(), 0

        def call(caller: int) -> None:
            nonlocal num_used
            with httpx.Client(timeout=120) as client:
                number = caller
                while not stop.is_set():
                    use(url, client, number)
                    number += NUM_CALLERS
                    num_used += 1

        calls = [callers.submit(call, caller) for caller in range(NUM_CALLERS)]
        try:
            time.sleep(WARM_UP_S)
            ends_at_s = time.monotonic() + SOAK_S
            parts = {name: descendant(name, command.pid) for name in PARTS}
            failed = lambda: any(one.done() for one in calls)  # noqa: E731
            samples = samples_of(parts, lambda: time.monotonic() > ends_at_s or failed())
        finally:
            stop.set()
        for made in calls:
            made.result()
    figures: dict[str, dict[str, float]] = {}
    for name, taken in samples.items():
        third = len(taken) // 3
        first, last = (
            [statistics.median(column) for column in zip(*some, strict=True)]
            for some in (taken[:third], taken[-third:])
        )
        figures[name] = dict(zip(("bytes", "threads", "files"), map(sub, last, first), strict=True))
    print(json.dumps({"seconds": SOAK_S, "requests": num_used, "growth": figures}))
    for growth in figures.values():
        assert growth["bytes"] < MAX_GROWTH_BYTES, figures
        assert max(growth["threads"], growth["files"]) <= MAX_MORE, figures
