"""The limits of one endpoint: its first piece of text, its refusals, and its path without a model."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import httpx
import psutil

from benchmarks.serve.command import ServeCommand
from benchmarks.serve.comparison import ROUTE, show, with_cpu_ms
from benchmarks.serve.load import STREAM, Load
from benchmarks.serve.processes import pss_bytes_by_name
from benchmarks.sides.contender import Contender

SATURATING = Load(callers=64)
OVERLOAD = 5
"""Arrivals, as a multiple of the saturating rate."""
STREAMING_SHARE = 0.5
"""Arrivals while the first piece is timed, as a fraction of the saturating rate."""
IMAGE_SIZE_PX = 64
"""Side of the images of the demonstration checkpoint."""


def measure_streaming(command: ServeCommand, images: Sequence[bytes], seconds: float) -> dict[str, Any]:
    """Time the first piece of streamed texts, at half of the saturating rate."""
    url = command.url + ROUTE
    saturated = SATURATING.offer(url, images, seconds / 2, STREAM)
    run = Load(per_s=STREAMING_SHARE * saturated["per_s"]).offer(url, images, seconds, STREAM)
    show("streaming", run)
    return run | {"saturated_per_s": saturated["per_s"]}


def measure_overload(command: ServeCommand, images: Sequence[bytes], seconds: float) -> dict[str, Any]:
    """Offer five times what the endpoint can serve; return its answers, refusals and readiness."""
    url = command.url + ROUTE
    saturated = SATURATING.offer(url, images, seconds / 8)
    before = sum(pss_bytes_by_name(command.process).values())
    probes: Counter[str] = Counter()
    probe_seconds: list[float] = []
    stop = threading.Event()

    def probe() -> None:
        while not stop.wait(1):
            began = time.monotonic()
            try:
                code = str(httpx.get(f"{command.url}/readyz", timeout=30).status_code)
            except httpx.TransportError as error:
                code = type(error).__name__
            probes[code] += 1
            probe_seconds.append(time.monotonic() - began)

    watch = threading.Thread(target=probe)
    watch.start()
    try:
        run = Load(per_s=OVERLOAD * saturated["per_s"]).offer(url, images, seconds)
    finally:
        stop.set()
        watch.join()
    after = sum(pss_bytes_by_name(command.process).values())
    recovered = time.monotonic()
    while httpx.post(url, files={"image": images[0]}, timeout=60).status_code != 200:
        time.sleep(0.05)
    show("overload", run)
    return run | {
        "saturated_per_s": saturated["per_s"],
        "readyz": dict(probes),
        "readyz_longest_s": max(probe_seconds),
        "grown_mib": (after - before) / 2**20,
        "answers_again_after_s": time.monotonic() - recovered,
    }


def measure_without_model(images: Sequence[bytes], seconds: float) -> dict[str, Any]:
    """Measure the path with an engine that computes nothing: requests per second of CPU time."""
    side = Contender(make_endpoint_without_model, IMAGE_SIZE_PX)
    try:
        root = psutil.Process(side.pid)
        url = side.call("url") + ROUTE
        SATURATING.offer(url, images, seconds / 4)
        runs = {}
        for load in (Load(callers=16), SATURATING):
            run = with_cpu_ms(root, lambda: load.offer(url, images, seconds))  # noqa: B023
            total_ms = sum(value for key, value in run.items() if key.endswith("_cpu_ms"))
            runs[str(load)] = run | {"per_s_per_core": 1000 / total_ms}
            show(f"without a model, {load}", runs[str(load)])
    finally:
        side.call("shutdown")
        side.close()
    return runs


def make_endpoint_without_model(image_size_px: int) -> Any:
    """Create the endpoint in a contender's process."""
    from deploy.local_service import set_ray_environment

    set_ray_environment()  # before Ray is imported
    from benchmarks.sides.serve_side import endpoint_without_model

    return endpoint_without_model(image_size_px)
