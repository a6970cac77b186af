"""If Ray does not start, the command says in one sentence what to do, exits with 1 and leaves no process."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import psutil
import pytest

from pipeline.storage.folder import Folder
from tests.integration.inputs import write_tars

MODULE = "tests.chaos.own_clusters.ray_that_fails"
AGENTS_END_WITHIN_S = 30.0
"""Ray's agents are children of the raylet; they end by themselves once they notice that it is gone."""


@pytest.fixture
def ray_folder() -> Iterator[str]:
    """A folder that the command lines of this test's Ray processes name; short, because it holds sockets."""
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield folder


def processes_that_name(text: str) -> list[str]:
    lines = [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
    return [line for line in lines if text in line]


def test_a_timeout_is_one_sentence_and_leaves_no_process(tmp_path, ray_folder):
    """On a loaded machine the command used to end in Ray's traceback, while its processes went on."""
    write_tars(tmp_path / "in", num_tars=1, rows_per_tar=2)
    settings = {"input": [str(tmp_path / "in")], "output": str(tmp_path / "out")}
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-m", MODULE, json.dumps({"settings": settings, "engine": {}})],
        env=environment | {"RAY_TMPDIR": ray_folder},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("blip2: Ray did not start on this machine: The current node timed out")
    assert "run the same command again" in done.stderr
    assert done.stderr.count("\n") == 1
    processes = json.loads(done.stdout.splitlines()[-1])
    assert {"gcs_server", "raylet"} <= set(processes["started"])
    assert processes["left"] == []
    deadline = time.monotonic() + AGENTS_END_WITHIN_S
    while left := processes_that_name(ray_folder):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
    assert Folder(str(tmp_path / "out")).get("_blip2/lease.json") is None
