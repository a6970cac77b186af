"""The job on a cluster: `ray job submit` to a cluster of its own, from a copy of the tree."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from PIL import Image
from ray.job_submission import JobStatus, JobSubmissionClient

from blip2_actor.demo.scenes import SceneSampler, draw

# A whole cluster starts and ends, and a job with its own interpreter; this takes minutes on a busy machine.
pytestmark = pytest.mark.timeout(480)

ROOT = Path(__file__).parents[3]
BIN = Path(sys.executable).parent
PORTS = (
    "port",
    "dashboard-port",
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
    "runtime-env-agent-port",
    "metrics-export-port",
    "ray-client-server-port",
    "node-manager-port",
    "object-manager-port",
)


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [held.getsockname()[1] for held in sockets]
    for held in sockets:
        held.close()
    return ports


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    with tempfile.TemporaryDirectory(prefix="rj", dir="/tmp", ignore_cleanup_errors=True) as folder:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        # The job runs `python`; on a cluster that is the Python on which Ray runs.
        path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
        yield kept | {"PATH": path, "RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": folder}


@pytest.fixture(scope="module")
def dashboard(environment: dict[str, str]) -> Iterator[str]:
    """A cluster under one process in the foreground, so that all of it can be ended, and nothing else."""
    ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
    command = [str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=2", "--disable-usage-stats"]
    command += ["--node-ip-address=127.0.0.1", "--object-store-memory=200000000"]
    command += [
        "--min-worker-port=0",
        "--max-worker-port=0",
    ]  # any; the default may be in use
    command += [f"--{name}={port}" for name, port in ports.items()]
    ray = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    printed = []
    assert ray.stdout is not None
    for line in ray.stdout:
        printed.append(line)
        if "Ray runtime started" in line:
            break
    else:
        pytest.fail("".join(printed))
    yield f"http://127.0.0.1:{ports['dashboard-port']}"
    started = [*psutil.Process(ray.pid).children(recursive=True), ray]
    for process in started:
        process.kill()
    ray.communicate()
    psutil.wait_procs(started[:-1], timeout=30)


@pytest.mark.slow
def test_the_tree_is_submitted_and_captions_its_input(
    dashboard: str, environment: dict[str, str], tmp_path: Path
) -> None:
    scenes = SceneSampler("held_out", seed=0).sample(20)
    (tmp_path / "images").mkdir()
    for number, pixels in enumerate(draw(scenes, side_px=96)):
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number:02}.png")
    submit = [str(BIN / "ray"), "job", "submit", "--address", dashboard, "--submission-id", "captions"]
    submit += ["--working-dir", ".", "--", "python", "-m", "pipeline", "caption"]
    submit += ["--model", "demo", "--device", "cpu"]
    submit += ["--input", str(tmp_path / "images"), "--output", str(tmp_path / "captions")]
    done = subprocess.run(submit, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    # The command exits with 0 or 1, whatever the exit status of the job.
    job = JobSubmissionClient(dashboard).get_job_info("captions")
    assert (job.status, job.driver_exit_code) == (JobStatus.SUCCEEDED, 0)
    [output] = (tmp_path / "captions").glob("*.parquet")
    rows = pq.read_table(output).to_pylist()
    assert [row["key"] for row in rows] == sorted(row["key"] for row in rows)
    assert len(rows) == 20
    assert all(row["status"] == "ok" and row["caption"].endswith("background") for row in rows)
