"""Applications, pictures and their expected captions, for the tests of the running endpoint."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
from PIL import Image
from ray import serve

from blip2_actor import EngineBuilder, EngineStats
from blip2_actor.testing import FakeEngineConfig, fake_caption
from deploy.app import compose
from deploy.settings import Settings

NUM_CALLERS = 16
"""Number of requests that the fake application serves at once."""
SIDE_PX = FakeEngineConfig().image_size_px


def png(seed: int) -> bytes:
    """Return a picture of the model's own size, which resizing does not change."""
    pixels = np.random.default_rng(seed).integers(0, 255, (SIDE_PX, SIDE_PX, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def caption_of(image: bytes, prompt: str | None = None) -> str:
    return fake_caption(np.asarray(Image.open(io.BytesIO(image))), prompt)


FAULTY = png(1_000)
"""The picture on which the device of the fake engine fails."""


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true"
        time.sleep(0.02)


def target(route: str, engine: EngineBuilder, **settings: Any) -> serve.RunTarget:
    """Return one application; its actors reserve neither of the two CPUs, which the batch job needs."""
    free = {"ray_actor_options": {"num_cpus": 0}}
    application = compose(engine, Settings(**settings), captioner=free, gateway=free)
    return serve.RunTarget(application, name=route, route_prefix=route)


def engine_stats(app: str = "/") -> EngineStats:
    return serve.get_deployment_handle("Captioner", app).stats.remote().result(timeout_s=10)


def post(url: str, image: bytes, **fields: str) -> httpx.Response:
    return httpx.post(f"{url}/v1/caption", files={"image": image}, data=fields, timeout=30)
