"""`hf://datasets/…` is an input like a bucket: a small hub on the loopback interface serves it."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs

import pytest
from huggingface_hub import HfFileSystem, close_session, constants

from pipeline.inputs.listing import list_shards
from pipeline.inputs.reader import ReadOptions, ShardWork
from pipeline.inputs.stamps import read_unchanged
from tests.unit.fetching.web_server import ClosingServer
from tests.unit.inputs.formats.reading_cases import read_rows, tar_bytes

REPO, COMMIT = "me/set", "0" * 40
FILES = {f"data/{n}.tar": tar_bytes([(f"{n}.jpg", b"image %d" % n)]) for n in range(3)}


class Hub(BaseHTTPRequestHandler):
    """What `HfFileSystem` asks a hub for: the repository, its tree, and its files in ranges."""

    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if found := re.fullmatch(rf"/datasets/{REPO}/resolve/[^/]+/(.+)", path):
            self.send_file(found[1])
        elif re.fullmatch(rf"/api/datasets/{REPO}(/revision/[^/]+)?", path):
            self.send_json({"id": REPO, "sha": COMMIT, "private": False, "tags": [], "siblings": []})
        elif found := re.fullmatch(rf"/api/datasets/{REPO}/tree/[^/]+(?:/(.*))?", path):
            entries = [self.entry(file) for file in FILES if found[1] and file.startswith(f"{found[1]}/")]
            if not found[1]:
                entries.append({"type": "directory", "path": "data", "oid": COMMIT})
            self.send_json(entries)
        else:
            self.send(404, b"")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        paths = body.get("paths", [])
        self.send_json([self.entry(path) for path in paths if path in FILES])

    def entry(self, file: str) -> dict[str, object]:
        return {"type": "file", "path": file, "oid": COMMIT, "size": len(FILES[file])}

    def send_file(self, file: str) -> None:
        content = FILES[file]
        asked = re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked is None:
            self.send(200, content)
        else:
            self.send(206, content[int(asked[1]) : int(asked[2]) + 1])

    def send_json(self, value: object) -> None:
        self.send(200, json.dumps(value).encode())

    def send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"1"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with ClosingServer(Hub) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        HfFileSystem.clear_instance_cache()
        yield
        HfFileSystem.clear_instance_cache()
        close_session()
        server.shutdown()


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("name", ["data", "data/*.tar", "data/{0..2}.tar"])
def test_a_data_set_of_the_hub_is_read(name: str) -> None:
    shards = list_shards(f"hf://datasets/{REPO}/{name}")
    assert [shard.name for shard in shards] == ["0.tar", "1.tar", "2.tar"]
    for number, shard in enumerate(shards):
        rows, report = read_rows(shard)
        assert [row["image"] for row in rows] == [b"image %d" % number]
        assert report.complete
    assert sum(map(len, read_unchanged(ShardWork(shard=shards[0]), ReadOptions()))) == 1
