"""A real cluster of several nodes on this machine, and its processes by what they do, to be killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray.cluster_utils import Cluster

NODE = {"num_cpus": 2, "object_store_memory": 100 << 20}
"""One of the workers' nodes; the head has no CPUs, as it should be on a cluster that loses machines."""
DEADLINE_S = 240


@contextmanager
def cluster(num_nodes: int, **node: Any) -> Iterator[Cluster]:
    head = {"num_cpus": 0, "object_store_memory": 100 << 20, "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(num_nodes):
            made.add_node(**NODE, **node)
        made.wait_for_nodes()
        yield made
    finally:
        made.shutdown()


def start_driver(
    cluster: Cluster, settings: dict[str, Any], engine: dict[str, Any], log: Path
) -> subprocess.Popen:
    """The caption command with a fake engine, in a process of its own."""
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.drive", json.dumps({"settings": settings, "engine": engine})],
            env={**os.environ, "RAY_ADDRESS": cluster.address},
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def processes(cluster: Cluster, what: str) -> list[int]:
    """The cluster's processes whose command line holds a text; those of other clusters are not looked at."""
    parents = {pid: parent for pid, (parent, _) in _table().items()}
    raylets = {node.all_processes["raylet"][0].process.pid for node in cluster.list_all_nodes()}
    return [
        pid for pid, (_, line) in _table().items() if what in line and raylets & set(_line_of(pid, parents))
    ]


def _line_of(pid: int, parents: dict[int, int]) -> Iterator[int]:
    while pid in parents:
        pid = parents[pid]
        yield pid


def _table() -> dict[int, tuple[int, str]]:
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                stat = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
                line = (
                    Path(f"/proc/{entry}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                )
            except OSError:
                continue
            if stat[0] not in "ZX":
                found[int(entry)] = (int(stat[1]), line)
    return found


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def wait_until(condition: Callable[[], Any], driver: subprocess.Popen, log: Path) -> Any:
    """What the condition gives once it is true; the driver must be at work meanwhile."""
    deadline = time.monotonic() + DEADLINE_S
    while not (value := condition()):
        assert driver.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    return value
