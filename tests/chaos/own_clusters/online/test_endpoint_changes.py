"""While the endpoint is updated under load, or has no engine, it replies with a caption or 503."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from ray import serve

from blip2_actor import EngineBuilder
from blip2_actor.testing import FakeEngineConfig
from deploy.app import NODE_ENVIRONMENT, compose
from deploy.settings import Settings
from tests.integration.online.endpoint import caption_of, engine_stats, png, post, wait_for
from tests.ports import free_port
from tests.small_ray import small_ray

pytestmark = pytest.mark.timeout(300)

NUM_CALLERS = 4
LOOK_BACK_S = 11.0
"""Just above Serve's own interval of ten seconds."""
PROBED_S = 120.0
SCALES_TO_ZERO = {
    "min_replicas": 0,
    "initial_replicas": 1,
    "max_replicas": 1,
    "upscale_delay_s": 0.1,
    "downscale_delay_s": 1.0,
    "look_back_period_s": LOOK_BACK_S,
}
PUSHES_OFTEN = {
    f"RAY_SERVE_{source}_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.2" for source in ("HANDLE", "REPLICA")
}


@pytest.fixture(scope="module")
def url(own_ray: None) -> Iterator[str]:
    os.environ.update(NODE_ENVIRONMENT | PUSHES_OFTEN)
    port = free_port()
    with small_ray(num_cpus=4):
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        yield f"http://127.0.0.1:{port}"
        serve.shutdown()


def deploy(
    engine: FakeEngineConfig,
    captioner: dict[str, Any] | None = None,
    others: dict[str, EngineBuilder] | None = None,
    **settings: Any,
) -> None:
    """Deploy or update the application; answers are not cached, so that every request reaches an engine."""
    free = {"ray_actor_options": {"num_cpus": 0}}
    application = compose(
        engine,
        Settings(cache_bytes=0, **settings),
        others=others,
        captioner=free | (captioner or {}),
        gateway=free,
    )
    serve.run(application, name="/", route_prefix="/")


def engines(deployment: str = "Captioner") -> int:
    """Return the number of engines that run or are starting."""
    replicas = serve.status().applications["/"].deployments[deployment].replica_states
    return sum(replicas.values())


def test_an_update_under_load_is_200_or_503(url: str) -> None:
    """Every other reply is 503 in JSON; Serve's own replies are plain text with other codes."""
    deploy(FakeEngineConfig(model="before", seconds_per_batch=0.02))
    answers: list[httpx.Response] = []
    stop = threading.Event()

    def call(number: int) -> None:
        image = png(number)
        while not stop.is_set():
            answers.append(answer := post(url, image))
            if answer.status_code == 200:
                assert answer.json()["caption"] == caption_of(image)

    def models() -> set[str]:
        return {answer.json()["model"] for answer in answers[-50:] if answer.status_code == 200}

    with ThreadPoolExecutor(NUM_CALLERS) as callers:
        calls = [callers.submit(call, number) for number in range(NUM_CALLERS)]
        try:
            wait_for(lambda: models() == {"before"})
            deploy(FakeEngineConfig(model="after", seconds_per_batch=0.02), timeout_s=30.0)
            wait_for(lambda: models() == {"after"}, seconds=60)
        finally:
            stop.set()
    for made in calls:
        made.result()
    assert {answer.status_code for answer in answers} <= {200, 503}
    for answer in answers:
        if answer.status_code == 503:
            assert answer.json()["error"]["message"] and int(answer.headers["retry-after"]) >= 1


def test_probes_start_no_engine_and_a_request_does(url: str) -> None:
    """If a probe asked an engine, it would keep that engine awake forever."""
    deploy(FakeEngineConfig(model="sleepy"), {"autoscaling_config": SCALES_TO_ZERO})
    assert post(url, png(1)).status_code == 200
    wait_for(lambda: engines() == 0, seconds=60)
    codes = set()
    ends_at_s = time.monotonic() + PROBED_S
    while time.monotonic() < ends_at_s:  # one request would start an engine, as the end of this test shows
        for path in ("/livez", "/readyz", "/healthz", "/startupz"):
            codes.add(httpx.get(f"{url}{path}").status_code)
        assert engines() == 0
    assert codes == {200}
    assert until_answered(lambda: post(url, png(1))).json()["caption"] == caption_of(png(1))
    assert engine_stats().num_finished == 1


def test_each_model_sleeps_until_a_request_names_it(url: str) -> None:
    """If a starting gateway asked all engines, it would wake models that nobody uses."""
    others: dict[str, EngineBuilder] = {"second": FakeEngineConfig(model="folder")}
    deploy(FakeEngineConfig(model="first"), {"autoscaling_config": SCALES_TO_ZERO}, others)
    wait_for(lambda: engines() == engines("Captioner_second") == 0, seconds=90)
    listed = httpx.get(f"{url}/v1/models").json()["data"]
    assert [model["id"] for model in listed] == ["first", "second"]
    answer = until_answered(lambda: post(url, png(1), model="second"))
    assert answer.json()["model"] == "second" and answer.json()["caption"] == caption_of(png(1))
    assert (engines(), engines("Captioner_second")) == (0, 1)
    assert post(url, png(1), model="third").status_code == 404


def until_answered(call: Callable[[], httpx.Response]) -> httpx.Response:
    """Repeat the call while the answer is 503, as a client does."""
    ends_at_s = time.monotonic() + 60
    while (answer := call()).status_code == 503 and time.monotonic() < ends_at_s:
        time.sleep(int(answer.headers["retry-after"]))
    return answer
