"""A normal caller next to hostile ones, each with a request that once stopped the endpoint for everybody."""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.synchronize import Event
from pathlib import Path

import httpx
import psutil
import pytest

from tests.chaos.own_clusters.online.test_endpoint_lifecycle import (
    CAPTION,
    PNG,
    SLOW,
    endpoint,
)
from tests.processes import descendant

pytestmark = pytest.mark.timeout(400)

ATTACK_S = 25.0
NUM_IDLE = 100
MAX_GROWTH_BYTES = 400 << 20
"""The proxy may hold 128 MiB for one client; the rest is for forwarding and parsing bodies of 16 MiB."""


def bomb() -> bytes:
    """Return a valid picture of 81 million pixels in 80 kB."""
    side, deflate = 9000, zlib.compressobj(9)
    rows = b"".join(deflate.compress(bytes(1 + 3 * side)) for _ in range(side)) + deflate.flush()
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", rows), (b"IEND", b"")]
    packed = [struct.pack(">I", len(c)) + t + c + struct.pack(">I", zlib.crc32(t + c)) for t, c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def form(image: bytes, options: str = "{}") -> bytes:
    return (
        b'--xx\r\nContent-Disposition: form-data; name="options"\r\n\r\n%b\r\n'
        b'--xx\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n%b\r\n--xx--\r\n'
    ) % (options.encode(), image)


def head(num_bytes: int, *more: str, media: str = "multipart/form-data; boundary=xx") -> bytes:
    lines = ["POST /v1/caption HTTP/1.1", "Host: localhost", f"Content-Type: {media}", *more]
    return "\r\n".join([*lines, f"Content-Length: {num_bytes}", "", ""]).encode()


def hostile_requests() -> list[tuple[bytes, float]]:
    """Return the body to send, and how long the client waits before it disconnects."""
    picture = form(bomb())
    # The requests differ, because equal ones would share their work.
    heavies = [form(PNG, json.dumps(SLOW | {"no_repeat_ngram_size": size})) for size in range(50, 66)]
    punycode = (
        b'--xx\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n-' + b"b" * 300_000 + b"\r\n--xx--\r\n"
    )
    lists = b'{"options":[' + b"[]," * (4 << 20) + b"[]]}"
    return [
        *[(head(len(heavy)) + heavy, 60.0) for heavy in heavies[:8]],
        *[(head(len(heavy), "x-request-disconnect-disabled: ?1") + heavy, 0.5) for heavy in heavies[8:]],
        *[(head(len(picture)) + picture, 60.0)] * 6,
        *[(head(len(punycode), media="multipart/form-data; boundary=xx; charset=punycode") + punycode, 5.0)]
        * 2,
        *[(head(len(lists), media="application/json") + lists, 10.0)] * 2,
        *[(head(20 << 20) + bytes(19 << 20), 60.0)] * 8,
        *[(head(100) + b"{", 60.0)] * 12,
        *[(b"GET /v1/model HTTP/1.1\r\nHost: localhost\r\nX-A: ", 60.0)] * 8,
    ]


def attack(port: int, request: bytes, stay_s: float, ends_at_s: float) -> None:
    """Repeat a request; wait each time until it is answered or the client's time is up."""
    while time.monotonic() < ends_at_s:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5) as client:
            client.settimeout(min(stay_s, max(0.1, ends_at_s - time.monotonic())))
            client.sendall(request)
            client.recv(65536)
        time.sleep(0.2)  # limits the load on this machine


def attack_with_all(port: int, has_begun: Event) -> None:
    """Send every hostile request for `ATTACK_S`, each from its own client."""
    requests = hostile_requests()
    ends_at_s = time.monotonic() + ATTACK_S
    with ThreadPoolExecutor(len(requests)) as clients:
        for request, stay_s in requests:
            clients.submit(attack, port, request, stay_s, ends_at_s)
        has_begun.set()


@contextlib.contextmanager
def under_attack(port: int) -> Iterator[None]:
    """Attack during the block from another process, so that its threads do not delay the measurements."""
    spawning = multiprocessing.get_context("spawn")
    has_begun = spawning.Event()
    attackers = spawning.Process(target=attack_with_all, args=(port, has_begun))
    attackers.start()
    try:
        assert has_begun.wait(60)
        yield
    finally:
        attackers.join(60)
        attackers.kill()


def latencies(call: Callable[[], httpx.Response], until: Iterator[bool]) -> list[float]:
    """Send one call after another; return their durations in seconds, sorted."""
    seconds = []
    for _ in itertools.takewhile(bool, until):
        began_s = time.monotonic()
        answer = call()
        seconds.append(time.monotonic() - began_s)
        assert answer.status_code == 200, answer.text
    return sorted(seconds)


def p99(seconds: list[float]) -> float:
    return seconds[min(len(seconds) - 1, int(0.99 * len(seconds)))]


def test_an_innocent_caller_does_not_notice_hostile_ones(tmp_path: Path) -> None:
    # One client with a new connection per request: setting up TLS must not count in the latency.
    caller = httpx.Client(verify=False, timeout=120, headers={"connection": "close"})
    with (
        caller,
        endpoint(tmp_path, "--slots", "32") as (url, command),
        ThreadPoolExecutor(1) as watcher,
    ):

        def caption() -> httpx.Response:
            answer = caller.post(f"{url}/v1/caption", files={"image": PNG})
            assert answer.json().get("caption") == CAPTION, answer.text
            return answer

        def probe() -> httpx.Response:
            return caller.get(f"{url}/startupz")

        parts = [descendant(part, command.pid) for part in ("ServeReplica:blip2:Gateway", "ProxyActor")]
        # With Ray's default of 15, the attackers would get most of the CPU time.
        assert all(part.nice() <= psutil.Process().nice() for part in parts)
        idle = latencies(caption, iter([True] * NUM_IDLE + [False]))
        before = [part.memory_info().rss for part in parts]
        peaks, done = [before], threading.Event()

        def watch() -> None:
            while not done.wait(0.1):
                peaks.append([part.memory_info().rss for part in parts])

        watcher.submit(watch)
        try:
            with under_attack(int(url.rpartition(":")[2])):
                ends_at_s = time.monotonic() + ATTACK_S
                attacked = latencies(caption, iter(lambda: time.monotonic() < ends_at_s, None))
                lag = latencies(probe, iter([True] * 50 + [False]))
        finally:
            done.set()
        growth_bytes = max(sum(now) for now in peaks) - sum(before)
        figures = {
            "idle_p99_s": p99(idle),
            "attacked_p99_s": p99(attacked),
            "num_attacked": len(attacked),
            "probe_p99_s": p99(lag),
            "growth_mib": growth_bytes >> 20,
            "growth_of_gateway_and_proxy_mib": [
                (max(of_part) - of_part[0]) >> 20 for of_part in zip(*peaks, strict=True)
            ],
        }
        print(json.dumps(figures))
        # Twice the idle latency, plus half a second because decoders and attackers use the two cores too.
        assert p99(attacked) < 2 * p99(idle) + 0.5, figures
        assert growth_bytes < MAX_GROWTH_BYTES, figures
        assert psutil.pid_exists(parts[0].pid) and psutil.pid_exists(parts[1].pid)
