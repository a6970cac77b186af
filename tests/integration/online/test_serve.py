"""The endpoint as callers see it: a real Serve instance, HTTP, decoding processes and an engine."""

from __future__ import annotations

import hashlib
import io
import json
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pyarrow.parquet as pq
import pytest
from PIL import Image
from ray import serve

from blip2_actor import EngineConfig
from pipeline.progress import Console
from pipeline.run.prepare import prepare
from pipeline.run.run_job import run_job
from pipeline.settings.job_settings import CaptionSettings
from tests.integration.online.endpoint import (
    FAULTY,
    NUM_CALLERS,
    caption_of,
    engine_stats,
    png,
    post,
    wait_for,
)
from tests.integration.online.endpoint_process import poison, serving
from tests.ports import free_port
from tests.processes import is_loopback, listening_ports

# Six processes import Ray, and one of them torch; this takes minutes on a busy machine.
pytestmark = pytest.mark.timeout(480)

COLUMNS = ["caption", "num_tokens", "finish_reason", "flags", "status", "error", "width", "height"]


def test_concurrent_requests_share_passes_and_keep_their_own_answers(url: str, closed_gate: Path) -> None:
    images = [png(seed) for seed in range(NUM_CALLERS)]
    before = engine_stats()
    with ThreadPoolExecutor(NUM_CALLERS) as callers:
        answers = [callers.submit(post, url, image, prompt=f"p{n}") for n, image in enumerate(images)]
        # All of them reach the engine while it is busy with the first: no limit of Serve holds one back.
        wait_for(lambda: engine_stats().num_requests - before.num_requests == NUM_CALLERS)
        # The gateway, not Serve, refuses at once one more request than it admits.
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


def test_a_caller_that_disconnects_frees_its_slot(url: str, closed_gate: Path) -> None:
    before = engine_stats()
    for number in range(NUM_CALLERS + 4):  # different images, because equal requests share one slot
        image = png(5_000 + number)
        # If the earlier callers still held their slots, the last four would be refused instead of waiting.
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/caption", files={"image": image}, timeout=httpx.Timeout(10, read=0.15))
    closed_gate.unlink()
    assert post(url, png(4_999)).status_code == 200
    # The engine was busy with the first request; the others were cancelled before it started on them.
    assert engine_stats().num_requests - before.num_requests > 2
    assert engine_stats().num_finished - before.num_finished < 5


def test_a_caller_that_disconnects_takes_nobody_with_it(url: str, closed_gate: Path) -> None:
    """Ray used to cancel the call of the first of several equal requests, and all of them got 503."""
    gateway = serve.get_deployment_handle("Gateway", "/")

    def num_in_flight() -> int:
        return int(gateway.stats.remote().result(timeout_s=10)["num_in_flight"])

    wait_for(lambda: num_in_flight() == 0)
    with ThreadPoolExecutor(2) as callers:
        image, before = png(6_000), engine_stats()
        first = callers.submit(httpx.post, f"{url}/v1/caption", files={"image": image}, timeout=3)
        wait_for(lambda: engine_stats().num_requests > before.num_requests)
        second = callers.submit(post, url, image)
        wait_for(lambda: num_in_flight() == 2)
        assert isinstance(first.exception(), httpx.ReadTimeout)
        wait_for(lambda: num_in_flight() < 2)
        closed_gate.unlink()
        assert second.result().json()["caption"] == caption_of(image)
    assert engine_stats().num_requests - before.num_requests == 1


def test_captions_are_those_of_the_batch_job_in_fewer_passes_than_requests(
    url: str, real_engine: EngineConfig, tmp_path: Path
) -> None:
    images = {f"{n:02}": png(n) for n in range(NUM_CALLERS)}
    (tmp_path / "in").mkdir()
    for key, image in images.items():
        (tmp_path / "in" / f"{key}.png").write_bytes(image)
    job = CaptionSettings(input=(str(tmp_path / "in"),), output=str(tmp_path / "out"), engine=real_engine)
    run_job(prepare(job), Console(io.StringIO()))
    [output] = (tmp_path / "out").glob("*.parquet")
    rows = pq.read_table(output).select(COLUMNS).to_pylist()

    before = engine_stats("/real")
    with ThreadPoolExecutor(NUM_CALLERS) as callers:
        answers = callers.map(lambda image: post(f"{url}/real", image).json(), images.values())
        online = [{name: answer[name] for name in COLUMNS} for answer in answers]
    assert engine_stats("/real").num_encode_calls - before.num_encode_calls < NUM_CALLERS
    assert len({answer["caption"] for answer in online}) > 1
    assert online == rows


def test_an_engine_that_fails_is_replaced(url: str) -> None:
    refused = post(url, FAULTY)
    assert (refused.status_code, refused.json()["error"]["type"]) == (503, "overloaded")
    wait_for(lambda: post(url, png(2)).status_code == 200, seconds=120)
    assert engine_stats().num_finished < 5  # the other engine, with its own counters


def test_the_page_the_model_and_readiness(url: str) -> None:
    assert httpx.get(f"{url}/healthz").json() == {"status": "ok"}
    model = httpx.get(f"{url}/v1/model").json()
    assert model["model"] == "demo" and model["options"]["max_new_tokens"] == 30
    assert "<form" in httpx.get(url).text


def test_the_command_serves_the_demonstration_and_ends_with_all_it_started(tmp_path: Path) -> None:
    """In a folder whose files have our packages' names, Ray would have its workers import these files."""
    poison(tmp_path)
    port = free_port()
    operator = "the key of the operator"
    admin_keys = tmp_path / "admin_keys.txt"
    admin_keys.write_text(f"operator {hashlib.sha256(operator.encode()).hexdigest()}\n")
    flags = ["--port", str(port), "--max-new-tokens", "4", "--admin-keys-file", str(admin_keys)]
    with serving(tmp_path, *flags) as command:
        assert command.stdout is not None
        lines = [command.stdout.readline() for _ in range(4)]
        assert f"http://127.0.0.1:{port}/" in lines[0], (lines, command.communicate()[1])
        assert httpx.get(f"http://127.0.0.1:{port}/v1/model").json()["options"]["max_new_tokens"] == 4
        scene = httpx.get(f"http://127.0.0.1:{port}/scene.png")
        answer = post(f"http://127.0.0.1:{port}", scene.content, options='{"max_new_tokens": 30}')
        assert answer.json()["caption"].endswith("background")
        operate(f"http://127.0.0.1:{port}", {"authorization": f"Bearer {operator}"})
        check_logs_and_metrics(lines[3], answer)
        started = psutil.Process(command.pid).children(recursive=True)
        assert len(started) > 3
        listening = listening_ports(command.pid)
        assert port in {number for _, number in listening} and all(is_loopback(ip) for ip, _ in listening)
        command.send_signal(signal.SIGTERM)
        assert command.communicate(timeout=120)[0] == "stopped\n"
        assert command.returncode == 0
        _, alive = psutil.wait_procs(started, timeout=30)
        assert not alive
    # A token file would affect every later Ray of this user.
    assert not (tmp_path / ".ray" / "auth_token").exists()


def operate(url: str, key: dict[str, str]) -> None:
    """Drain and resume, and read the counters of every replica."""
    assert httpx.post(f"{url}/admin/drain", headers=key, timeout=30).json() == {"status": "draining"}
    assert post(url, png(1)).status_code == httpx.get(f"{url}/readyz").status_code == 503
    assert httpx.post(f"{url}/admin/resume", headers=key, timeout=30).json() == {"status": "serving"}
    level = httpx.post(f"{url}/admin/log-level", headers=key, json={"level": "debug"}, timeout=30)
    assert level.json() == {"level": "debug"}
    [engine] = httpx.get(f"{url}/admin/stats", headers=key, timeout=30).json()["engines"]
    assert engine["num_finished"] == 1


def check_logs_and_metrics(said: str, answer: httpx.Response) -> None:
    """Find a request in the log and in the metrics, at the places that the command prints."""
    found = re.fullmatch(r"  logs in (\S+), metrics on (http://127\.0\.0\.1:\d+/metrics)\n", said)
    assert found is not None, said
    [log] = Path(found[1]).glob("replica_*Gateway*.log")
    requests = [
        line for line in map(json.loads, log.read_text().splitlines()) if line["message"] == "request"
    ]
    [line] = [line for line in requests if line["http_route"] == "/v1/caption" and line["code"] == 200]
    assert line["request_id"] == answer.headers["x-request-id"]
    assert (line["slots"], line["steps"]) == (1, 30) and line["engine_ms"] > 0
    counted = 'ray_blip2_http_request_duration_seconds_count{.*code="200".*route="/v1/caption".*} 1.0'
    names = [
        "ray_blip2_build_info{",
        "ray_blip2_engine_step_seconds_bucket{",
        "ray_blip2_encode_batch_images_sum{",
        "ray_blip2_queue_seconds_count{",
        "ray_blip2_refused_requests_total{",
        "ray_serve_num_http_requests",
    ]

    def all_are_there() -> bool:
        """Each process exports its metrics at a different time."""
        text = httpx.get(found[2]).text
        return re.search(counted, text) is not None and all(name in text for name in names)

    wait_for(all_are_there, seconds=40)
