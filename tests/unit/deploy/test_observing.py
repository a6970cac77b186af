"""What an operator sees of requests: a log line, `Server-Timing`, metrics, and the routes under /admin."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
from pathlib import Path
from typing import Any

import httpx
import pytest
from ray import serve
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.util.metrics import Counter, Gauge, Histogram
from starlette.requests import ClientDisconnect
from starlette.types import Message

from blip2_actor import Completion, EngineStats, ModelInfo, Result, __version__
from blip2_actor.testing import FakeEngineConfig
from deploy.guard.access import Access
from deploy.guard.admission import Admission
from deploy.guard.cost import Cost
from deploy.guard.front import Front
from deploy.guard.keys import KeyFile
from deploy.http.errors import ApiError
from deploy.observe import fleet, metrics
from deploy.observe.request_record import AccessLog
from deploy.work import ImageOutputs
from tests.unit.deploy.routes.engine_service import EngineService, ask, error_of, png
from tests.unit.deploy.test_deploy_gateway import Handle, gateway

KEY, OPERATOR = "the key of alice", "the key of the operator"
Seen = list[tuple[str, float, dict[str, str]]]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """The recorded metrics: name, value and labels."""
    found: Seen = []

    def record(metric: Any, value: float = 1.0, tags: dict[str, str] | None = None) -> None:
        found.append((metric.info["name"], value, tags or {}))

    monkeypatch.setattr(Counter, "inc", record)
    monkeypatch.setattr(Histogram, "observe", record)
    monkeypatch.setattr(Gauge, "set", record)
    return found


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    return key_file(tmp_path / "keys.txt", "alice", KEY)


def key_file(path: Path, name: str, key: str) -> Path:
    path.write_text(f"{name} {hashlib.sha256(key.encode()).hexdigest()}\n")
    return path


def outputs() -> ImageOutputs:
    completion = Completion(text="a dog", token_ids=(1, 2), logprob=-1.0, finish_reason="stop")
    return ImageOutputs(texts=(Result(completions=(completion,)),))


def test_a_request_is_one_log_line_with_its_caller_cost_and_times(
    seen: Seen, keys_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def send() -> httpx.Response:
        async with gateway(Handle(outputs()), keys_file=str(keys_file)) as made:
            transport = httpx.ASGITransport(made.__serve_build_asgi_app__())
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                query = {"num_beams": "3", "max_new_tokens": "9"}
                headers = {"authorization": f"Bearer {KEY}", "content-type": "image/png"}
                await client.get("/readyz", headers=headers)
                return await client.post("/v1/caption", content=png(), params=query, headers=headers)

    with caplog.at_level(logging.INFO, "ray.serve"):
        response = asyncio.run(send())
    assert response.json()["caption"] == "a dog"
    [line] = [record for record in caplog.records if record.message == "request"]
    fields = vars(line)
    assert (fields["key"], fields["http_route"], fields["code"]) == ("alice", "/v1/caption", 200)
    assert (fields["slots"], fields["steps"]) == (3, 9)
    assert KEY not in repr(fields)
    phases = ["queue", "decode", "engine", "total"]
    assert [part.split(";")[0] for part in response.headers["server-timing"].split(", ")] == phases
    assert 0 < fields["decode_ms"] < fields["total_ms"]
    values = {name: (value, labels) for name, value, labels in seen}
    assert values["blip2_admitted_slot_steps_total"] == (27, {})
    assert values["blip2_http_request_duration_seconds"][1] == {"route": "/v1/caption", "code": "200"}
    assert {"blip2_queue_seconds", "blip2_image_decode_seconds"} <= values.keys()


@pytest.mark.parametrize(
    ("raised", "code"), [(asyncio.CancelledError, 499), (ClientDisconnect, 499), (RuntimeError, 500)]
)
def test_a_request_without_an_answer_has_a_code(
    raised: type[BaseException], code: int, seen: Seen, caplog: pytest.LogCaptureFixture
) -> None:
    """A failure of the service used to count as a client that left, and raised no alert."""

    async def end(scope: Any, receive: Any, send: Any) -> None:
        raise raised

    async def run() -> None:
        with pytest.raises(raised):
            await AccessLog(end)({"type": "http", "method": "POST", "path": "/", "headers": []}, None, None)  # type: ignore[arg-type]

    with caplog.at_level(logging.INFO, "ray.serve"):
        asyncio.run(run())
    assert vars(caplog.records[-1])["code"] == code
    assert seen[-1][2]["code"] == str(code)


def test_a_client_that_leaves_in_its_body_is_no_error_in_the_log(seen: Seen) -> None:
    """Serve used to log it as a failure of the request, with a traceback."""

    async def leave() -> Message:
        return {"type": "http.disconnect"}

    async def send(_: Message) -> None:
        pass

    async def run() -> None:
        async with gateway(Handle(outputs())) as made:
            headers = [(b"host", b"localhost"), (b"content-type", b"image/png")]
            scope = {"type": "http", "method": "POST", "path": "/v1/caption", "headers": headers}
            await made.__serve_build_asgi_app__()(scope | {"query_string": b""}, leave, send)

    asyncio.run(run())
    assert [labels["code"] for name, _, labels in seen if "http_request" in name] == ["499"]


def test_refused_cost_is_counted_by_reason(seen: Seen) -> None:
    async def run() -> None:
        door = Admission(slots=8, max_in_flight=1, timeout_s=5)
        async with door.serve(Cost(slots=1, steps=30)):
            with pytest.raises(ApiError):
                await door.serve(Cost(slots=16, steps=180)).__aenter__()
            assert door.stats()["num_in_flight"] == 1

    asyncio.run(run())
    reason = {"reason": "overloaded"}
    assert ("blip2_refused_slot_steps_total", 16 * 180, reason) in seen
    assert ("blip2_refused_requests_total", 1, reason) in seen


def test_the_front_counts_what_it_answers_itself(seen: Seen) -> None:
    async def send() -> int:
        transport = httpx.ASGITransport(Front(None))  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return (await client.post("/v1/caption", headers={"content-encoding": "gzip"})).status_code

    assert asyncio.run(send()) == 415
    labels = {"code": "415", "type": "unsupported_media_type"}
    assert ("blip2_front_answers_total", 1, labels) in seen


def test_the_steps_of_an_engine_are_observed(seen: Seen) -> None:
    service = EngineService(FakeEngineConfig(model="demo"))
    assert ask(service, "POST", "/v1/caption", content=png()).status_code == 200
    service.captioner._actor.close()  # the engine's thread has finished its last step
    names = {name: value for name, value, _ in seen}
    assert names["blip2_encode_batch_images"] == names["blip2_generated_tokens_total"] == 1
    assert [labels for name, _, labels in seen if name == "blip2_engine_step_seconds"] == [{"work": "encode"}]


def test_the_state_of_an_engine_is_shown(seen: Seen) -> None:
    info = ModelInfo(model="m", image_size_px=8, dtype="float32", digest="d")
    metrics.show_engine(info, EngineStats(num_running=3, num_waiting=2))
    labels = {"version": __version__, "model": "m", "digest": "d", "dtype": "float32"}
    assert seen == [
        ("blip2_engine_slots_in_use", 3, {}),
        ("blip2_engine_waiting", 2, {}),
        ("blip2_build_info", 1, labels),
    ]


class Replicas:
    """Like a handle of Serve that knows no replica at first, or ever."""

    def __init__(self, num_unknown: float, answers: list[Any]) -> None:
        """An error among the answers is that of one replica."""
        self.num_unknown, self.answers = num_unknown, answers

    def broadcast(self, method: str, *arguments: Any) -> Replicas:
        self.num_unknown -= 1
        return self

    async def results_async(self, *, return_exceptions: bool = False) -> list[Any]:
        if self.num_unknown >= 0:
            raise DeploymentUnavailableError("Captioner")
        errors = [answer for answer in self.answers if isinstance(answer, Exception)]
        if errors and not return_exceptions:
            raise errors[0]
        return self.answers


def test_the_fleet_is_asked_again_until_its_replicas_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scaled to zero, there are no engines, and asking for counters must start none."""
    known = {"Gateway": Replicas(2, [{"num_in_flight": 0}]), "Captioner": Replicas(math.inf, [])}
    monkeypatch.setattr(serve, "get_deployment_handle", lambda name, application: known[name])
    monkeypatch.setattr(fleet, "PAUSE_S", 0.0)
    stats = asyncio.run(fleet.Fleet("blip2", ["Captioner"]).stats())
    assert stats == {"gateways": [{"num_in_flight": 0}], "engines": []}


def test_a_replica_that_dies_does_not_fail_what_reaches_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """The drain used to be stored, but the operator got a 500."""
    gateways = Replicas(0, [ActorDiedError(), {"num_in_flight": 0}])
    monkeypatch.setattr(serve, "get_deployment_handle", lambda name, application: gateways)
    assert asyncio.run(fleet.Fleet("blip2", []).stats())["gateways"] == [{"num_in_flight": 0}]
    gateways.answers = [ValueError("a defect")]
    with pytest.raises(ValueError, match="a defect"):
        asyncio.run(fleet.Fleet("blip2", []).stats())


def test_admin_routes_are_for_admin_keys_alone(keys_file: Path, tmp_path: Path) -> None:
    service = EngineService()
    admins = KeyFile(str(key_file(tmp_path / "admins.txt", "op", OPERATOR)))
    routes = service.api

    def call(method: str, path: str, key: str, admin_keys: KeyFile | None = admins, **request: Any) -> Any:
        service.api = Access(routes, keys=KeyFile(str(keys_file)), admin_keys=admin_keys)  # type: ignore[assignment]
        headers = {"authorization": f"Bearer {key}", "host": "localhost"}
        return ask(service, method, path, headers=headers, **request)

    assert error_of(call("POST", "/admin/drain", OPERATOR, admin_keys=None))[:2] == (404, "not_found")
    for path in ("/admin/drain", "/admin/resume", "/admin/log-level", "/admin/anything"):
        assert error_of(call("POST", path, KEY))[:2] == (401, "wrong_key")
    assert error_of(call("POST", "/v1/caption", OPERATOR, content=png()))[:2] == (401, "wrong_key")
    assert not service.replicas.calls
    assert call("POST", "/admin/drain", OPERATOR).json() == {"status": "draining"}
    assert call("POST", "/admin/resume", OPERATOR).json() == {"status": "serving"}
    assert call("POST", "/admin/log-level", OPERATOR, json={"level": "debug"}).json() == {"level": "debug"}
    assert error_of(call("POST", "/admin/log-level", OPERATOR, json={"level": "all"}))[0] == 400
    assert service.replicas.calls == [True, False, "debug"]
    assert call("GET", "/admin/stats", OPERATOR).json()["engines"] == [{"num_tokens": 5}]
