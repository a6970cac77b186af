"""The Ray that a job starts on one machine."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

import pytest

from tests.processes import is_loopback

PROGRAM = """
from pipeline.run.cluster import connected, set_ray_environment
set_ray_environment()
import os
import psutil, ray
from tests.processes import listening_ports, titled_descendants
class Add:
    def __call__(self, batch):
        return {"sum": batch["id"] + 1}
with connected() as cluster:
    added = ray.data.range(41).map_batches(Add, compute=ray.data.ActorPoolStrategy(size=1), num_cpus=0.5)
    print(added.max("sum"), cluster.is_local)
    for title, _ in titled_descendants():
        print(title)
    for address, port in listening_ports(os.getpid()):
        print("listens:", address, port)
print("left:", len(psutil.Process().children()))
"""


@pytest.mark.slow
def test_a_local_ray_has_only_the_processes_that_a_job_needs() -> None:
    """The others took seconds of each run to start and end. No other machine can reach these."""
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp", ignore_cleanup_errors=True) as folder:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            capture_output=True,
            text=True,
            timeout=240,
            env=kept | {"RAY_TMPDIR": folder},
        )
    assert done.stdout.startswith("41 True\n") and done.stdout.endswith("left: 0\n"), done.stderr
    assert "raylet" in done.stdout
    idle_actors = ("StatsActor", "AutoscalingCoordinator", "ActorLocationTracker")
    for idle in ("monitor.py", "log_monitor.py", "dashboard/dashboard.py", *idle_actors):
        assert idle not in done.stdout, done.stdout
    listening = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("listens: ")]
    assert listening and all(map(is_loopback, listening)), done.stdout
