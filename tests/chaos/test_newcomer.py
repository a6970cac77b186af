"""A newcomer follows the README and the tutorial word for word, in an environment of their own.

The wheel and torch come from where pip finds packages, and published checkpoints from a hub on the loopback
interface: of their layout and with random weights. What needs a bucket, a cluster or a source tree is left
out. The test prints how long each command takes; most of it is pip (`pytest -s`).
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from blip2_actor.testing.tiny_checkpoints import save_tiny_checkpoint
from examples.drawn_pictures import draw_pictures
from tests.contracts.installed_wheel import build_wheel
from tests.integration.test_readme import ROOT, Block, blocks

COMMIT = "0123456789abcdef" * 2 + "01234567"
MODELS = {"Salesforce/blip2-flan-t5-xl": "t5", "Salesforce/blip2-opt-2.7b-coco": "opt"}
NUM_PHOTOS = 33
NOT_HERE = ("s3://", "make ", "curl ", "ray ", "blip2 serve", "blip2 submit", "--index-url")
"""What needs a bucket, a source tree, an endpoint, a cluster, or an index of another host."""


class ModelHub(BaseHTTPRequestHandler):
    """What `snapshot_download` asks a hub for."""

    protocol_version = "HTTP/1.1"
    folders: Mapping[str, Path]

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/[^/]+|/tree/[^/]+)?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
        if found and found[1] in self.folders:
            sizes = {one.name: one.stat().st_size for one in self.folders[found[1]].iterdir()}
            if (found[2] or "").startswith("/tree/"):
                entries = [{"type": "file", "path": n, "oid": COMMIT, "size": s} for n, s in sizes.items()]
                self.send(200, json.dumps(entries).encode())
                return
            siblings = [{"rfilename": name, "size": size} for name, size in sizes.items()]
            num_parameters = sizes["model.safetensors"] // 4
            counted = {"parameters": {"F32": num_parameters}, "total": num_parameters}
            info = {"id": found[1], "sha": COMMIT, "private": False, "tags": [], "siblings": siblings}
            info["safetensors"] = counted
            self.send(200, json.dumps(info).encode())
        elif file and file[1] in self.folders and (self.folders[file[1]] / file[2]).is_file():
            self.send(200, (self.folders[file[1]] / file[2]).read_bytes())
        else:
            self.send(404, b"")

    do_HEAD = do_GET

    def send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hash(body):x}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a hub with the checkpoints that the tutorial names."""
    root = tmp_path_factory.mktemp("hub")
    ModelHub.folders = {
        model: save_tiny_checkpoint(root / language, language) for model, language in MODELS.items()
    }
    with ThreadingHTTPServer(("127.0.0.1", 0), ModelHub) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class Newcomer:
    """Somebody with a fresh home, who types commands and waits for them."""

    def __init__(self, root: Path, hub: str) -> None:
        self.root = root
        self.venv = root / "env"
        self.minutes: list[tuple[float, str]] = []
        of_pip = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
        self.environment = of_pip | {
            "HOME": str(root / "home"),
            "PIP_CONSTRAINT": str(ROOT / "constraints.txt"),  # the versions that are tested
            "PATH": f"{self.venv / 'bin'}:/usr/bin:/bin",
            "HF_ENDPOINT": hub,
            "LANG": "C.UTF-8",
        }
        (root / "home").mkdir()
        subprocess.run([sys.executable, "-m", "venv", str(self.venv)], check=True)

    def folder(self, name: str) -> Path:
        """Return a new working folder with what the documents take for granted."""
        folder = self.root / name
        draw_pictures(folder / "photos", NUM_PHOTOS)
        shutil.copy(next((folder / "photos").glob("*.png")), folder / "picture.png")
        (folder / ".venv").symlink_to(self.venv)
        return folder

    def run(self, command: list[str], cwd: Path) -> str:
        """Run one command, which must succeed, and return what it has printed."""
        began = time.monotonic()
        done = subprocess.run(command, cwd=cwd, env=self.environment, capture_output=True, text=True)
        shown = shlex.join(command)
        self.minutes.append(((time.monotonic() - began) / 60, shown))
        print(f"{self.minutes[-1][0]:6.1f} min  {shown}", flush=True)
        assert done.returncode == 0, f"{shown}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr


def lines_of(block: Block) -> list[list[str]]:
    """The command lines of a block that work on this machine."""
    return [
        shlex.split(line, comments=True)
        for line in block.text.splitlines()
        if not any(word in line for word in NOT_HERE)
    ]


@pytest.mark.timeout(3600)  # most of it is pip
def test_the_readme_and_the_tutorial_lead_to_captions(tmp_path: Path, hub: str) -> None:
    newcomer = Newcomer(tmp_path, hub)
    folder = newcomer.folder("readme")
    (folder / "dist").mkdir()
    shutil.copy(build_wheel(tmp_path / "wheel"), folder / "dist")
    install, *others = blocks("sh", ("README.md",))
    for block in (install, *(block for block in others if block.runs)):
        for words in lines_of(block):
            newcomer.run(words, folder)
    assert (folder / "report.html").exists() and list((folder / "captions").rglob("*.parquet"))
    for block in blocks("python", ("README.md",)):
        if block.runs:
            assert newcomer.run(["python", "-c", block.text], folder).strip().endswith(" ok")

    folder = newcomer.folder("tutorial")
    said = ""
    for block in blocks("sh", ("docs/tutorial.md",)):
        for words in lines_of(block):
            said += newcomer.run(words, folder)
    for name in ("captions", "captions_coco", "answers"):
        assert f"output: {folder / name}" in said or f"output: {name}" in said
    assert said.count(f"{NUM_PHOTOS} rows = {NUM_PHOTOS} ok + 0 failed") == 3
    assert len(list((folder / "tables").glob("*.csv"))) == 1
    print(f"{sum(minutes for minutes, _ in newcomer.minutes):6.1f} min  all of it")
    assert os.listdir(tmp_path / "home"), "nothing was cached in the newcomer's own home"
