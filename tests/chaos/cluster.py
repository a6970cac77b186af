"""A real cluster of several nodes on this machine; its processes are found by command line and killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray.cluster_utils import Cluster

NODE = {"num_cpus": 2, "object_store_memory": 100 << 20}
"""A worker node; the head has no CPUs, as recommended for a cluster whose machines may disappear."""
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
    cluster: Any, settings: dict[str, Any], engine: dict[str, Any], log: Path
) -> subprocess.Popen:
    """Start the caption command with a fake engine in its own process, on the cluster at an address."""
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.drive", json.dumps({"settings": settings, "engine": engine})],
            env={**os.environ, "RAY_ADDRESS": cluster.address},
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def processes(cluster: Cluster, what: str) -> list[int]:
    """Return the processes of this cluster whose command line contains a text."""
    return [pid for node in cluster.list_all_nodes() for pid in processes_of(node, what)]


def processes_of(node: Any, what: str) -> list[int]:
    """Return the processes of a node (a `ray` Node) whose command line contains a text."""
    raylet = node.all_processes["raylet"][0].process.pid
    table = _table()
    return [pid for pid, (_, line) in table.items() if what in line and raylet in _ancestors(pid, table)]


def descendants(pid: int) -> list[int]:
    """Return all descendants of a process."""
    table = _table()
    return [other for other in table if pid in list(_ancestors(other, table))[1:]]


def _ancestors(pid: int, table: Mapping[int, tuple[int, str]]) -> Iterator[int]:
    """Yield the parent of a process, the parent's parent, and so on."""
    while pid in table:
        pid = table[pid][0]
        yield pid


def _table() -> dict[int, tuple[int, str]]:
    """Return the parent and the command line of each running process."""
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
    """Wait until `condition` returns a true value, and return it; fail if the driver ends first."""
    deadline = time.monotonic() + DEADLINE_S
    while not (value := condition()):
        assert driver.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    return value
