"""The committed Serve config at two requests a second, during updates, rollbacks and deaths.

The latency limit needs a machine that is otherwise idle.
"""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from deploy.app import NODE_ENVIRONMENT
from tests.chaos.own_clusters.online.fake_application import NO_SUCH_MODEL
from tests.integration.online.endpoint import caption_of, png, wait_for
from tests.integration.online.endpoint_process import ROOT
from tests.ports import free_port
from tests.processes import descendant
from tests.small_ray import small_ray

pytestmark = pytest.mark.timeout(580)

CONFIG = ROOT / "deploy/serve_config.yaml"
PER_S = 2.0
MAX_P99_S = 5.0
BURST = 16
"""Number of requests sent at once before a replica is killed."""
SEEN_AFTER_S = 1.0
"""Seconds after which requests no longer go to a dead replica."""
PATIENCE_S = 60.0
TIMEOUT_S = 10.0
"""`timeout_s` of the service, shorter than the committed one to keep the test short."""


@dataclass(frozen=True)
class Answered:
    code: int
    type: str | None
    model: str | None
    is_right: bool
    began_s: float
    seconds: float

    @property
    def failure(self) -> str | None:
        return None if self.code == 200 and self.is_right else f"{self.code} {self.type}"


@dataclass
class Load:
    """Send requests at a fixed rate, each with another picture, without waiting for earlier answers."""

    url: str
    answers: list[Answered] = field(default_factory=list)
    _numbers: Iterator[int] = field(default_factory=itertools.count)
    _callers: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(64))

    @contextmanager
    def running(self) -> Iterator[None]:
        stop = threading.Event()

        def offer() -> None:
            while not stop.wait(1 / PER_S):
                self.send(1)

        thread = threading.Thread(target=offer)
        with self._callers:
            thread.start()
            try:
                yield
            finally:
                stop.set()
                thread.join()

    def send(self, number: int) -> None:
        for _ in range(number):
            self._callers.submit(self._ask, next(self._numbers))

    def _ask(self, number: int) -> None:
        image, began_s = png(number), time.monotonic()
        try:
            answer = httpx.post(f"{self.url}/v1/caption", files={"image": image}, timeout=PATIENCE_S)
            code, found = answer.status_code, answer.json()
        except (httpx.HTTPError, ValueError) as error:
            code, found = 0, {"error": {"type": type(error).__name__}}
        seconds = time.monotonic() - began_s
        is_right = found.get("caption") == caption_of(image)
        kind = (found.get("error") or {}).get("type")
        self.answers.append(Answered(code, kind, found.get("model"), is_right, began_s, seconds))

    def wait_for_model(self, model: str) -> None:
        """Wait until the latest answers come from one model."""
        begun = len(self.answers)
        wait_for(
            lambda: (
                len(self.answers) >= begun + 6 and {answer.model for answer in self.answers[-6:]} == {model}
            ),
            seconds=90,
        )

    def figures(self) -> dict[str, Any]:
        seconds = sorted(answer.seconds for answer in self.answers)
        return {
            "num_requests": len(seconds),
            "failed": [one.failure for one in self.answers if one.failure],
            "p50_s": round(seconds[len(seconds) // 2], 3),
            "p99_s": round(seconds[min(len(seconds) - 1, int(0.99 * len(seconds)))], 3),
            "max_s": round(seconds[-1], 3),
        }


@dataclass
class Service:
    """The application of the committed config on a Ray of this machine."""

    url: str
    missing: Path

    def deploy(self, model: str, **captioner: Any) -> None:
        """Apply the committed config with a fake engine, which needs no accelerator."""
        config = yaml.safe_load(CONFIG.read_text())
        (application,) = config["applications"]
        application["import_path"] = "tests.chaos.own_clusters.online.fake_application:build"
        arguments = application["args"]
        del arguments["keys_file"]
        arguments |= {"allow_anonymous": True, "cache_bytes": 0, "missing": str(self.missing)}
        arguments |= {"timeout_s": TIMEOUT_S, "engine": {"model": model}}
        for deployment in application["deployments"]:
            deployment["ray_actor_options"] = {"num_cpus": 0}
            deployment.pop("max_replicas_per_node", None)  # this Ray has one node
        schema = ServeDeploySchema(applications=config["applications"])
        _get_global_client().deploy_apps(schema)

    def status(self) -> str:
        return serve.status().applications["blip2"].status.value

    def is_whole(self) -> bool:
        """Return whether two replicas of each part run, and no others."""
        application = serve.status().applications["blip2"]
        return application.status == "RUNNING" and all(
            {state: number for state, number in part.replica_states.items() if number} == {"RUNNING": 2}
            for part in application.deployments.values()
        )


@pytest.fixture(scope="module")
def service(own_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    os.environ.update(NODE_ENVIRONMENT)
    os.environ["PYTHONPATH"] = str(ROOT)
    port = free_port()
    with small_ray(num_cpus=4):
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        one = Service(f"http://127.0.0.1:{port}", tmp_path_factory.mktemp("models") / "missing")
        one.deploy("one")
        wait_for(one.is_whole, seconds=120)
        yield one
        serve.shutdown()


def check(what: str, load: Load) -> None:
    """Assert that nobody was refused, got a wrong caption or waited too long."""
    figures = show(what, load)
    assert not figures["failed"], figures
    assert figures["p99_s"] < MAX_P99_S, figures


def show(what: str, load: Load) -> dict[str, Any]:
    figures = load.figures()
    print(json.dumps({"what": what, **figures}), flush=True)
    return figures


def during(service: Service, what: str, act: Callable[[Load], object]) -> None:
    load = Load(service.url)
    with load.running():
        wait_for(lambda: len(load.answers) >= 4)
        act(load)
    check(what, load)


def test_an_update_and_a_rollback(service: Service) -> None:
    def update(load: Load) -> None:
        service.deploy("two")
        load.wait_for_model("two")
        wait_for(service.is_whole, seconds=120)

    def roll_back(load: Load) -> None:
        service.deploy("one")
        load.wait_for_model("one")
        wait_for(service.is_whole, seconds=120)

    during(service, "update", update)
    during(service, "rollback", roll_back)


def test_a_bad_update_and_the_way_back(service: Service) -> None:
    """Engines of an update that cannot start must not replace those that serve."""

    def bad_update(load: Load) -> None:
        service.deploy(NO_SUCH_MODEL)
        wait_for(lambda: service.status() in ("DEPLOY_FAILED", "UNHEALTHY"), seconds=120)
        load.wait_for_model("one")
        service.deploy("one")
        wait_for(service.is_whole, seconds=120)
        load.wait_for_model("one")

    during(service, "bad update and the way back", bad_update)


def kill_under_load(service: Service, load: Load, part: str) -> float:
    """Kill a busy replica, wait for its replacement, and return the time of the kill."""
    victim = descendant(f"ServeReplica:blip2:{part}")
    before = len(load.answers)
    load.send(BURST)
    wait_for(lambda: len(load.answers) >= before + BURST // 4)  # both replicas are busy with the rest
    killed_at_s = time.monotonic()
    victim.kill()
    wait_for(lambda: not service.is_whole(), seconds=60)
    wait_for(service.is_whole, seconds=120)
    return killed_at_s


def test_nobody_notices_the_death_of_an_engine(service: Service) -> None:
    wait_for(service.is_whole, seconds=120)
    during(service, "death of a Captioner", lambda load: kill_under_load(service, load, "Captioner"))


def test_the_death_of_a_gateway_costs_its_requests_in_flight_alone(service: Service) -> None:
    """Only the dead replica had the image, so the client must send it again."""
    wait_for(service.is_whole, seconds=120)
    load = Load(service.url)
    with load.running():
        wait_for(lambda: len(load.answers) >= 4)
        killed_at_s = kill_under_load(service, load, "Gateway")
    figures = show("death of a Gateway", load)
    failed = [one for one in load.answers if one.failure]
    assert len(failed) < BURST, figures  # the other gateway has answered its share
    for one in failed:
        assert one.began_s < killed_at_s + SEEN_AFTER_S, (one, figures)
        assert one.code == 0 or (one.code >= 500 and one.type), (one, figures)
    assert figures["p99_s"] < MAX_P99_S, figures


def test_without_an_engine_the_answer_is_503_in_time(service: Service) -> None:
    """Requests used to wait for an engine that never came, until the client gave up."""
    wait_for(service.is_whole, seconds=120)
    service.missing.touch()
    try:
        for _ in range(2):
            descendant("ServeReplica:blip2:Captioner").kill()
            time.sleep(0.5)
        began_s = time.monotonic()
        answer = httpx.post(f"{service.url}/v1/caption", files={"image": png(1)}, timeout=PATIENCE_S)
        assert time.monotonic() - began_s < TIMEOUT_S + 3
        assert answer.status_code == 503 and answer.json()["error"]["type"] == "not_ready", answer.text
        assert int(answer.headers["retry-after"]) >= 1
    finally:
        service.missing.unlink()
    wait_for(service.is_whole, seconds=120)
