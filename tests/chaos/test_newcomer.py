"""A newcomer follows the README and the tutorial word for word, in a fresh environment.

The wheel and torch come from pip's configured index. Published checkpoints come from a hub on loopback, with
their layout and random weights. Commands that need a bucket, a cluster or a source tree are skipped.
The tests print how long each command takes; most of it is pip (`pytest -s`).
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import takewhile
from pathlib import Path

import pytest

from blip2_actor.testing.tiny_checkpoints import save_tiny_checkpoint
from examples.drawn_pictures import draw_pictures
from tests.contracts.installed_wheel import build_wheel
from tests.documents import ROOT, Block, blocks
from tests.ports import free_port

COMMIT = "0123456789abcdef" * 2 + "01234567"
MODELS = {"Salesforce/blip2-flan-t5-xl": "t5", "Salesforce/blip2-opt-2.7b-coco": "opt"}
NUM_PHOTOS = 33
NOT_HERE = ("s3://", "make ", "ray ", "blip2 submit", "--index-url")
"""Commands that need a bucket, a source tree, a cluster, or an index on another host."""


class ModelHub(BaseHTTPRequestHandler):
    """The requests that `snapshot_download` sends to a hub."""

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
    """A user with a fresh home folder who types commands and waits for them."""

    def __init__(self, root: Path, hub: str) -> None:
        self.root = root
        self.venv = root / "env"
        self.minutes: list[float] = []
        of_pip = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
        self.environment = of_pip | {
            "HOME": str(root / "home"),
            "PIP_CONSTRAINT": str(ROOT / "constraints.txt"),  # the tested versions
            "PATH": f"{self.venv / 'bin'}:/usr/bin:/bin",
            "HF_ENDPOINT": hub,
            "LANG": "C.UTF-8",
        }
        (root / "home").mkdir()
        subprocess.run([sys.executable, "-m", "venv", str(self.venv)], check=True)

    def folder(self, name: str) -> Path:
        """Return a new working folder with the files that the documents assume."""
        folder = self.root / name
        draw_pictures(folder / "photos", NUM_PHOTOS)
        shutil.copy(next((folder / "photos").glob("*.png")), folder / "picture.png")
        (folder / ".venv").symlink_to(self.venv)
        return folder

    def run(self, line: str, cwd: Path, status: int = 0) -> str:
        """Run a line in a shell, assert its exit status, and return its output."""
        with self.timed(line):
            done = subprocess.run(["bash", "-c", line], cwd=cwd, env=self.environment, capture_output=True)
        said = (done.stdout + done.stderr).decode()
        assert done.returncode == status, f"{line}\n{said}"
        return said

    @contextmanager
    def timed(self, line: str) -> Iterator[None]:
        """Print how long the block takes, labeled with a line."""
        began = time.monotonic()
        yield
        self.minutes.append((time.monotonic() - began) / 60)
        print(f"{self.minutes[-1]:6.1f} min  {line.splitlines()[0]}", flush=True)

    @contextmanager
    def served(self, line: str, cwd: Path) -> Iterator[None]:
        """Run a line in another terminal during the block, which begins once its first line of output says
        that it is ready, and end it with Ctrl-C."""
        server = subprocess.Popen(
            shlex.split(line), cwd=cwd, env=self.environment, stdout=subprocess.PIPE, text=True
        )
        assert server.stdout is not None
        try:
            with self.timed(line):
                said = list(takewhile(lambda line: " is ready on " not in line, server.stdout))
            assert server.poll() is None, "".join(said)
            yield
        finally:
            server.send_signal(signal.SIGINT)
            server.communicate(timeout=120)


def lines_of(block: Block) -> list[str]:
    """Return the command lines of a block that work on this machine."""
    lines = [line.partition("#")[0].strip() for line in block.text.splitlines()]
    return [line for line in lines if line and not any(word in line for word in NOT_HERE)]


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory: pytest.TempPathFactory, hub: str) -> Newcomer:
    return Newcomer(tmp_path_factory.mktemp("newcomer"), hub)


@pytest.mark.timeout(3600)  # pip takes most of it
def test_the_readme_leads_to_captions(newcomer: Newcomer) -> None:
    """The whole README in order, from installation to endpoint, plus the files that its lines assume."""
    folder = newcomer.folder("readme")
    (folder / "dist").mkdir()
    shutil.copy(build_wheel(newcomer.root / "wheel"), folder / "dist")
    (code,) = blocks("python", ("README.md",))
    port = free_port()
    for block in blocks("sh", ("README.md",)):
        lines = [line.replace("8000", str(port)) for line in lines_of(block)]
        if not lines or not lines[0].startswith("blip2 serve"):
            for line in lines:
                newcomer.run(line, folder)
            continue
        assert newcomer.run(f"python -c {shlex.quote(code.text)}", folder).strip().endswith(" ok")
        serve, ask = lines
        missing = newcomer.run(serve, folder, status=3)
        newcomer.run(missing.rpartition("; run: ")[2].strip(), folder)
        with newcomer.served(serve, folder):
            answer, _ = json.JSONDecoder().raw_decode(newcomer.run(ask, folder))  # the rest is curl's
            assert answer["caption"]
    assert (folder / "report.html").exists()
    for output in ("captions", "photo_captions"):
        assert list((folder / output).rglob("*.parquet"))


@pytest.mark.timeout(1800)
def test_the_tutorial_leads_to_captions_of_ones_own(newcomer: Newcomer) -> None:
    """The tutorial continues from the README, in the same environment."""
    folder = newcomer.folder("tutorial")
    said = ""
    for block in blocks("sh", ("docs/tutorial.md",)):
        for line in lines_of(block):
            said += newcomer.run(line, folder)
    for name in ("captions", "captions_coco", "answers"):
        assert f"output: {folder / name}" in said or f"output: {name}" in said
    assert said.count(f"{NUM_PHOTOS} rows = {NUM_PHOTOS} ok + 0 failed") == 3
    assert len(list((folder / "tables").glob("*.csv"))) == 1
    print(f"{sum(newcomer.minutes):6.1f} min  all of it")
    assert os.listdir(newcomer.root / "home"), "nothing was cached in the newcomer's own home"
