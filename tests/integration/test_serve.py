"""The endpoint as its callers meet it: a real Serve instance, HTTP, decoding children and an engine."""

from __future__ import annotations

import io
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import ray
from PIL import Image
from ray import serve

from blip2_actor import EngineStats
from blip2_actor.preprocess import ImageLimits
from deploy.app import compose
from deploy.settings import Settings
from tests.fake_engine import FakeEngineConfig, fake_caption

NUM_CALLERS = 16
SIDE_PX = FakeEngineConfig().image_size_px


def png(seed: int) -> bytes:
    """A picture at the model's own size, so that resizing changes nothing."""
    pixels = np.random.default_rng(seed).integers(0, 255, (SIDE_PX, SIDE_PX, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def caption_of(image: bytes, prompt: str | None = None) -> str:
    return fake_caption(np.asarray(Image.open(io.BytesIO(image))), prompt)


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """While this file exists, the fake engine finishes nothing."""
    return tmp_path_factory.mktemp("gate") / "closed"


@pytest.fixture(scope="module")
def url(gate: Path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    temp = tempfile.mkdtemp(prefix="rsv", dir="/tmp")  # short: Unix socket paths are
    before = os.environ.get("RAY_AUTH_MODE")
    os.environ["RAY_AUTH_MODE"] = "disabled"
    ray.init(
        address="local",
        num_cpus=4,
        object_store_memory=200 << 20,
        include_dashboard=False,
        log_to_driver=False,
        _temp_dir=temp,
    )
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    engine = FakeEngineConfig(model="demo", gate=str(gate))
    limits = ImageLimits(max_file_bytes=1 << 20, max_pixels=10_000)
    patient = Settings(max_in_flight=NUM_CALLERS, timeout_s=20, image=limits)
    hasty = Settings(timeout_s=0.5, decode_children=1)
    serve.run_many(
        [
            serve.RunTarget(compose(engine, patient), name="patient", route_prefix="/"),
            serve.RunTarget(compose(engine, hasty), name="hasty", route_prefix="/hasty"),
        ]
    )
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()
    shutil.rmtree(temp, ignore_errors=True)
    os.environ.pop("RAY_AUTH_MODE")
    if before is not None:
        os.environ["RAY_AUTH_MODE"] = before


@pytest.fixture
def closed_gate(gate: Path) -> Iterator[Path]:
    gate.touch()
    yield gate
    gate.unlink(missing_ok=True)


def engine_stats(app: str = "patient") -> EngineStats:
    return serve.get_deployment_handle("Captioner", app).stats.remote().result(timeout_s=10)


def post(url: str, image: bytes, **fields: str) -> httpx.Response:
    return httpx.post(f"{url}/v1/caption", files={"image": image}, data=fields, timeout=30)


def test_concurrent_requests_share_passes_and_keep_their_own_answers(url: str, closed_gate: Path) -> None:
    images = [png(seed) for seed in range(NUM_CALLERS)]
    before = engine_stats()
    with ThreadPoolExecutor(NUM_CALLERS) as callers:
        answers = [callers.submit(post, url, image, prompt=f"p{n}") for n, image in enumerate(images)]
        # All of them reach the engine while it is busy with the first: none waits behind Serve's limits.
        wait_for(lambda: engine_stats().num_requests - before.num_requests == NUM_CALLERS)
        # And one more than the gateway admits is told so at once, in our own words.
        refused = post(url, images[0])
        closed_gate.unlink()
        bodies = [answer.result().json() for answer in answers]
    assert [body["caption"] for body in bodies] == [caption_of(i, f"p{n}") for n, i in enumerate(images)]
    assert engine_stats().num_encode_calls - before.num_encode_calls < NUM_CALLERS
    assert (refused.status_code, refused.json()["error"]["type"]) == (503, "overloaded")
    assert refused.headers["retry-after"] == "1"


@pytest.mark.parametrize(
    ("image", "code", "kind"),
    [
        (b"no image at all", 422, "undecodable"),
        (png(0)[:200], 422, "undecodable"),
        (b"", 422, "missing_image"),
        (bytes((1 << 20) + 1), 413, "too_large"),
    ],
)
def test_bad_bytes_get_their_own_code(url: str, image: bytes, code: int, kind: str) -> None:
    response = post(url, image)
    assert (response.status_code, response.json()["error"]["type"]) == (code, kind)


def test_a_picture_of_too_many_pixels_is_413(url: str) -> None:
    file = io.BytesIO()
    Image.new("RGB", (101, 100)).save(file, "PNG")
    response = post(url, file.getvalue())
    assert (response.status_code, response.json()["error"]["type"]) == (413, "too_large")


def test_a_caller_that_goes_away_frees_its_place(url: str, closed_gate: Path) -> None:
    image = png(1)
    before = engine_stats()
    for _ in range(NUM_CALLERS):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/caption", files={"image": image}, timeout=httpx.Timeout(10, read=0.2))
    closed_gate.unlink()
    # Had they kept their places, these would be refused; had they kept their slots, all be captioned.
    with ThreadPoolExecutor(NUM_CALLERS) as callers:
        codes = list(callers.map(lambda _: post(url, image).status_code, range(NUM_CALLERS)))
    assert codes == [200] * NUM_CALLERS
    assert engine_stats().num_finished - before.num_finished < 2 * NUM_CALLERS


def test_a_request_that_times_out_gives_its_slot_back(url: str, closed_gate: Path) -> None:
    with ThreadPoolExecutor(4) as callers:
        answers = list(callers.map(lambda seed: post(f"{url}/hasty", png(seed)), range(4)))
    assert {(answer.status_code, answer.json()["error"]["type"]) for answer in answers} == {(504, "timeout")}
    closed_gate.unlink()
    assert post(f"{url}/hasty", png(9)).status_code == 200
    # The engine held one of the four; the others were given up before their turn (but the news of the
    # last may still have been on its way).
    assert engine_stats("hasty").num_finished < 5


def test_the_page_the_model_and_readiness(url: str) -> None:
    assert httpx.get(f"{url}/healthz").json() == {"status": "ok"}
    model = httpx.get(f"{url}/v1/model").json()
    assert model["model"] == "demo" and model["options"]["max_new_tokens"] == 30
    assert "<form" in httpx.get(url).text
