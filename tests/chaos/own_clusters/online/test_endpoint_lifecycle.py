"""While the endpoint drains or loses parts, it replies with a caption, or with 503 and a time to retry."""

from __future__ import annotations

import hashlib
import json
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from subprocess import Popen

import httpx
import pytest

from deploy.routes.pages import draw_scene_png
from tests.integration.online.endpoint import wait_for
from tests.integration.online.endpoint_process import serving
from tests.ports import free_port
from tests.processes import descendant

pytestmark = pytest.mark.timeout(400)

SLOW = {"num_beams": 16, "max_new_tokens": 180, "min_new_tokens": 180}
LENGTHS = (4, 7, 10, 30)
"""Maximum number of tokens for each caller."""
PNG, CAPTION = draw_scene_png()


def ask(url: str, **options: object) -> httpx.Response:
    data = {"options": json.dumps(options)} if options else {}
    return httpx.post(f"{url}/v1/caption", files={"image": PNG}, data=data, timeout=120)


@contextmanager
def endpoint(folder: Path, *flags: str) -> Iterator[tuple[str, Popen[str]]]:
    """Run an endpoint; on exit, tell it to stop unless it has already ended."""
    port = free_port()
    # Answers are not cached, so that every request reaches the parts that a test kills.
    flags = ("--port", str(port), "--num-threads", "1", "--cache-bytes", "0", *flags)
    with serving(folder, *flags) as command:
        assert command.stdout is not None
        assert "is ready" in command.stdout.readline(), command.communicate()[1]
        try:
            yield f"http://127.0.0.1:{port}", command
        finally:
            if command.poll() is None:
                command.send_signal(signal.SIGTERM)
            command.communicate(timeout=120)


def operator(folder: Path) -> tuple[dict[str, str], list[str]]:
    """Return the headers of an operator's requests, and the flags of an endpoint that accepts them."""
    admins, key = folder / "admins.txt", "the key of the operator"
    admins.write_text(f"operator {hashlib.sha256(key.encode()).hexdigest()}\n")
    return {"authorization": f"Bearer {key}"}, ["--admin-keys-file", str(admins)]


def num_running(url: str, headers: dict[str, str]) -> int:
    """Return the number of requests in the engine."""
    [engine] = httpx.get(f"{url}/admin/stats", headers=headers, timeout=60).json()["engines"]
    return int(engine["num_requests"] - engine["num_finished"])


def check_contract(answer: httpx.Response) -> None:
    """Assert that an answer is a caption, or says in JSON when to retry."""
    assert answer.status_code in (200, 503), answer.text
    if answer.status_code == 200:
        assert answer.json()["status"] == "ok"
    else:
        assert answer.json()["error"]["message"] and int(answer.headers["retry-after"]) >= 1


def test_a_drain_answers_what_has_begun_and_refuses_what_comes(tmp_path: Path) -> None:
    """SIGTERM during slow requests used to cause exit status 1, and 404 in plain text for new requests."""
    headers, flags = operator(tmp_path)
    with endpoint(tmp_path, *flags) as (url, command), ThreadPoolExecutor(3) as callers:
        slow = [callers.submit(ask, url, **SLOW | {"no_repeat_ngram_size": size}) for size in (50, 51, 52)]
        wait_for(lambda: num_running(url, headers) == 3, seconds=60)
        command.send_signal(signal.SIGTERM)
        refused = 0
        while not all(answer.done() for answer in slow):
            try:
                answer = ask(url)
                readiness = httpx.get(f"{url}/readyz")
            except httpx.TransportError:
                break  # the process has ended
            check_contract(answer)
            if answer.status_code == 503:
                refused += 1
                check_contract(readiness)
                assert readiness.status_code == 503
        assert [answer.result().status_code for answer in slow] == [200, 200, 200]
        assert refused
        assert command.wait(60) == 0


def test_a_gateway_that_is_replaced_during_a_drain_is_drained(tmp_path: Path) -> None:
    """A new gateway used to accept requests, although the operator had drained the service."""
    headers, flags = operator(tmp_path)
    with endpoint(tmp_path, *flags) as (url, command):
        assert ask(url).status_code == 200
        assert httpx.post(f"{url}/admin/drain", headers=headers, timeout=30).status_code == 200
        descendant("ServeReplica:blip2:Gateway", command.pid).kill()
        wait_for(lambda: httpx.get(f"{url}/startupz", timeout=60).status_code == 200, seconds=120)
        assert ask(url).status_code == httpx.get(f"{url}/readyz").status_code == 503
        assert httpx.post(f"{url}/admin/resume", headers=headers, timeout=30).status_code == 200
        assert ask(url).status_code == 200


def test_killed_parts_are_503_until_they_are_replaced(tmp_path: Path) -> None:
    with endpoint(tmp_path) as (url, command):
        recovered_in_s: dict[str, float] = {}
        for part in ("ServeReplica:blip2:Captioner", "ServeReplica:blip2:Gateway", "ProxyActor"):
            recovered_in_s[part] = kill_under_load(url, command, part)
        print(json.dumps({"recovered_in_s": recovered_in_s}))


def kill_under_load(url: str, command: Popen[str], part: str) -> float:
    """Kill a part under four callers; return the seconds until captions are served again.

    The callers ask for texts of different lengths, so that no two share the same work.
    """
    expected = {length: ask(url, max_new_tokens=length).json()["token_ids"] for length in LENGTHS}
    answers: list[httpx.Response] = []
    num_texts: Counter[int] = Counter()
    stop = threading.Event()

    def call(length: int) -> None:
        while not stop.is_set():
            try:
                answers.append(answer := ask(url, max_new_tokens=length))
                if answer.status_code == 200:
                    assert answer.json()["token_ids"] == expected[length]
                    num_texts[length] += 1
            except httpx.TransportError:
                time.sleep(0.05)  # the only node's proxy is dead, so no connection is accepted

    with ThreadPoolExecutor(len(LENGTHS)) as callers:
        calls = [callers.submit(call, length) for length in LENGTHS]
        try:
            time.sleep(1)
            killed_at_s = time.monotonic()
            descendant(part, command.pid).kill()
            time.sleep(1)
            num_before, deadline_s = len(answers), time.monotonic() + 90
            while not any(answer.status_code == 200 for answer in answers[num_before:]):
                assert time.monotonic() < deadline_s, answers[-1].text
                time.sleep(0.05)
            recovered_in_s = time.monotonic() - killed_at_s
        finally:
            stop.set()
    for made in calls:
        made.result()
    assert num_texts.keys() == set(LENGTHS)
    for answer in answers:
        check_contract(answer)
    return round(recovered_in_s, 1)
