"""A busy hub used to kill the job: here a loopback hub answers 429 and 503, then serves the files."""

from __future__ import annotations

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from blip2_actor.checkpoints import download, hub_patience
from blip2_actor.checkpoints.hub_patience import PATIENCE_S, retry_while_busy

REPO, COMMIT = "me/model", "5" * 40
FILES = {"config.json": b"{}", "model.safetensors": b"w" * 4096}


class Hub(BaseHTTPRequestHandler):
    """The requests that `snapshot_download` sends to a hub."""

    protocol_version = "HTTP/1.1"
    refusals: list[int]
    """Statuses of the next answers before files are served."""
    asked: Counter[str]
    """How often each file was sent."""

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if self.refusals:
            self.send(self.refusals.pop(0), b"", {"Retry-After": "0"})
        elif re.fullmatch(rf"/api/models/{REPO}(/revision/[^/]+)?", path):
            siblings = [{"rfilename": name} for name in FILES]
            self.send(200, json.dumps({"id": REPO, "sha": COMMIT, "siblings": siblings}).encode())
        elif re.fullmatch(rf"/api/models/{REPO}/tree/[^/]+", path):
            entries = [
                {"type": "file", "path": name, "oid": "6" * 40, "size": len(content)}
                for name, content in FILES.items()
            ]
            self.send(200, json.dumps(entries).encode())
        elif found := re.fullmatch(rf"/{REPO}/resolve/[^/]+/(.+)", path):
            self.asked[found[1]] += self.command == "GET"
            self.send(200, FILES[found[1]], {"X-Repo-Commit": COMMIT})
        else:
            self.send(404, b"")

    do_HEAD = do_GET

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"ETag": f'"{len(body)}"'} | (headers or {})).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[Hub]]:
    Hub.refusals, Hub.asked = [], Counter()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    ours = partial(snapshot_download, cache_dir=tmp_path / "hub", endpoint=endpoint)
    monkeypatch.setattr(download, "snapshot_download", ours)
    yield Hub
    server.shutdown()
    server.server_close()


def test_a_hub_that_asks_to_come_back_is_asked_again(
    hub: type[Hub], caplog: pytest.LogCaptureFixture
) -> None:
    hub.refusals = [429, 429, 503]
    folder, commit = download.fetch_from_hub(REPO, None, with_weights=True)
    assert (commit, (folder / "model.safetensors").read_bytes()) == (COMMIT, FILES["model.safetensors"])
    assert not hub.refusals
    assert any("the hub is busy (HTTP " in record.message for record in caplog.records)


def test_workers_of_a_node_download_once_and_a_pinned_commit_asks_nothing_more(hub: type[Hub]) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: download.fetch_from_hub(REPO, COMMIT, with_weights=True), range(4)))
    assert len(set(found)) == 1
    assert hub.asked == Counter(dict.fromkeys(FILES, 1))
    hub.refusals = [429] * 50
    assert download.fetch_from_hub(REPO, COMMIT, with_weights=True) == found[0]
    assert len(hub.refusals) == 50, "a node that has the commit needs no hub"


def failing(statuses: list[int], headers: dict[str, str]) -> Any:
    def request() -> str:
        if not statuses:
            return "done"
        response = httpx.Response(
            statuses.pop(0), headers=headers, request=httpx.Request("GET", "http://hub")
        )
        try:
            raise HfHubHTTPError("no", response=response)  # type: ignore[arg-type]
        except HfHubHTTPError as error:
            raise FileNotFoundError("not in the cache") from error

    return request


def test_pauses_are_those_that_the_hub_asks_for_or_double() -> None:
    slept: list[float] = []
    assert retry_while_busy(failing([429, 429], {"Retry-After": "20"}), slept.append) == "done"
    assert all(20 <= pause <= 24 for pause in slept) and len(slept) == 2
    slept.clear()
    assert retry_while_busy(failing([500, 502, 503], {}), slept.append) == "done"
    assert [round(pause // 1.0001) for pause in slept] == [1, 2, 4]


def test_other_answers_and_endless_ones_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError):
        retry_while_busy(failing([404], {}), lambda _: pytest.fail("it has waited"))
    began = now = time.monotonic()
    monkeypatch.setattr(hub_patience.time, "monotonic", lambda: now)

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    with pytest.raises(FileNotFoundError):
        retry_while_busy(failing([429] * 10_000, {}), sleep)
    assert PATIENCE_S / 2 < now - began < 2 * PATIENCE_S
