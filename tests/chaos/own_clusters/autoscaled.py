"""A cluster with Ray's real autoscaler on this machine, from the committed `ray_cluster.yaml`.

The node types and their limits are those of the file, with few cores per node. The provider is the one that
Ray tests itself with: it starts each node as processes of this machine.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests.chaos.cluster import DEADLINE_S, descendants, kill
from tests.integration.job.job_cluster import PORTS
from tests.ports import free_ports

CLUSTER_FILE = Path(__file__).parents[3] / "ray_cluster.yaml"
PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
HEAD_ID = "f" * 51 + "00000"
HEAD_TYPE = "ray.head.default"
"""The provider's name for the head."""
NO_COMMANDS = (
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "initialization_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
)
SMALL = {"cpu": {"CPU": 2}, "accelerator": {"CPU": 1}}
OBJECT_STORE_BYTES = 150_000_000


@dataclass(frozen=True)
class Autoscaled:
    """A running cluster for tests."""

    address: str
    configuration: Path
    """The config file of the autoscaler."""

    @contextmanager
    def paused_autoscaler(self) -> Iterator[None]:
        """Keep nodes from starting or stopping inside the block."""
        (autoscaler,) = [
            process
            for process in psutil.process_iter(["cmdline"])
            if {f"--autoscaling-config={self.configuration}", "-u"} <= set(process.info["cmdline"] or ())
        ]
        autoscaler.suspend()
        try:
            yield
        finally:
            autoscaler.resume()

    def nodes(self, resource: str) -> list[dict[str, Any]]:
        """Return the live nodes that have a resource; the caller must be connected to Ray."""
        import ray

        return [node for node in ray.nodes() if node["Alive"] and node["Resources"].get(resource)]


def configuration(gcs_address: str, max_accelerators: int) -> dict[str, Any]:
    """Return the committed cluster, set to run on this machine, with one more node type that has an NPU."""
    cluster = yaml.safe_load(CLUSTER_FILE.read_text())
    kinds = cluster["available_node_types"]
    kinds["accelerator"]["max_workers"] = max_accelerators
    kinds["accelerator_on_demand"]["max_workers"] = 0  # so that a test can keep all accelerators busy
    kinds["npu"] = {"min_workers": 0, "max_workers": 1, "resources": {"CPU": 1, "NPU": 1}}
    for name, kind in kinds.items():
        kind["node_config"] = {}
        kind.pop("docker", None)
        kind["resources"] |= {**SMALL.get(name, {}), "object_store_memory": OBJECT_STORE_BYTES}
    kinds[HEAD_TYPE] = kinds.pop(cluster["head_node_type"]) | {"min_workers": 0, "max_workers": 0}
    return {
        "cluster_name": cluster["cluster_name"],
        "max_workers": cluster["max_workers"],
        "idle_timeout_minutes": 0.2,
        "upscaling_speed": 1.0,
        "available_node_types": kinds,
        "head_node_type": HEAD_TYPE,
        "provider": {
            "type": "external",
            "module": PROVIDER,
            "gcs_address": gcs_address,
            "head_node_id": HEAD_ID,
            "launch_multiple": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "auth": {"ssh_user": "nobody"},
        "docker": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
        **{key: [] for key in NO_COMMANDS},
    }


@contextmanager
def autoscaled(folder: Path, max_accelerators: int) -> Iterator[Autoscaled]:
    """Start the head and its autoscaler, but no other node; on exit, end all their processes by id."""
    ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
    address = f"127.0.0.1:{ports['port']}"
    file, log = folder / "autoscaler.yaml", folder / "head.log"
    file.write_text(yaml.safe_dump(configuration(address, max_accelerators)))
    command = [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "start",
        "--head",
        "--block",
        "--disable-usage-stats",
    ]
    command += ["--node-ip-address=127.0.0.1", "--num-cpus=0"]
    command += [f"--{name}={port}" for name, port in ports.items()]
    command += ["--min-worker-port=0", "--max-worker-port=0", f"--object-store-memory={OBJECT_STORE_BYTES}"]
    environment = {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
        "RAY_NODE_TYPE_NAME": HEAD_TYPE,
        "RAY_raylet_start_wait_time_s": "200",
        "AUTOSCALER_UPDATE_INTERVAL_S": "2",
        "PYTHONPATH": str(CLUSTER_FILE.parent),
    }
    with log.open("wb") as output:
        head = subprocess.Popen(
            [*command, f"--autoscaling-config={file}"],
            env=os.environ | environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait_for_head(head, log)
        yield Autoscaled(_address_in(log), file)
    finally:
        for pid in [*descendants(head.pid), head.pid]:
            kill(pid, signal.SIGKILL)
        head.wait()


def _wait_for_head(head: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while "Ray runtime started" not in log.read_text():
        assert head.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


def _address_in(log: Path) -> str:
    """Return the address of the head: Ray replaces a loopback address by the machine's own."""
    found = re.search(r"--address='([^']+)'", log.read_text())
    assert found, log.read_text()
    return found[1]
