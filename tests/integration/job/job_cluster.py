"""A cluster that accepts jobs, started as users start one, with its own ports and folder."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.ports import free_ports

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


@contextmanager
def job_environment() -> Iterator[dict[str, str]]:
    """Yield the environment of a cluster's processes, and of the commands that use it."""
    with tempfile.TemporaryDirectory(prefix="rj", dir="/tmp", ignore_cleanup_errors=True) as folder:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        # The job runs `python`; on a cluster this is the Python that runs Ray.
        path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
        yield kept | {"PATH": path, "RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": folder}


@contextmanager
def job_cluster(environment: dict[str, str]) -> Iterator[str]:
    """Run a cluster under one process, so that all of it can be ended; yield the URL of its dashboard."""
    ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
    command = [str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=2", "--disable-usage-stats"]
    command += ["--node-ip-address=127.0.0.1", "--object-store-memory=200000000"]
    command += ["--min-worker-port=0", "--max-worker-port=0"]  # any port; the default range may be in use
    command += [f"--{name}={port}" for name, port in ports.items()]
    ray = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert ray.stdout is not None
    printed = []
    try:
        for line in ray.stdout:
            printed.append(line)
            if "Ray runtime started" in line:
                break
        else:
            pytest.fail("".join(printed))
        yield f"http://127.0.0.1:{ports['dashboard-port']}"
    finally:
        # Also when the test fails: a leftover cluster would disturb every later one.
        started = [*psutil.Process(ray.pid).children(recursive=True), ray]
        for process in started:
            process.kill()
        ray.communicate()
        psutil.wait_procs(started[:-1], timeout=30)
