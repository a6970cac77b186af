"""The preStop hook of the manifests drains a worker: Ray stops the node when nothing runs on it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import ray
import yaml
from ray.cluster_utils import Cluster

from tests.integration.online.endpoint import wait_for

CLUSTER = Path(__file__).parents[4] / "deploy/kubernetes/base/ray_cluster.yaml"


def hook(cluster: Cluster, raylet: int) -> subprocess.Popen:
    """Run the hook's command for one raylet; in a pod there is only one."""
    groups = yaml.safe_load(CLUSTER.read_text())["spec"]["workerGroupSpecs"]
    (container,) = groups[0]["template"]["spec"]["containers"]
    shell, flag, script = container["lifecycle"]["preStop"]["exec"]["command"]
    assert "/proc/[0-9]*/cmdline" in script
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    return subprocess.Popen(
        [shell, flag, script.replace("/proc/[0-9]*/", f"/proc/{raylet}/")],
        env={**os.environ, "PATH": path, "RAY_ADDRESS": cluster.address},
    )


def test_a_worker_ends_when_its_work_has_and_the_hook_of_one_that_has_ended_returns(tmp_path: Path) -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        node = cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, log_to_driver=False)
        raylet = node.all_processes["raylet"][0].process

        @ray.remote(num_cpus=1, max_retries=0)
        def work() -> str:
            (tmp_path / "runs").touch()
            time.sleep(8)
            return "done"

        answer = work.remote()
        wait_for((tmp_path / "runs").exists, seconds=60)
        draining = hook(cluster, raylet.pid)
        assert ray.get(answer, timeout=60) == "done"
        raylet.wait(timeout=60)
        draining.kill()  # as the container's end does
        draining.wait()
        again = hook(cluster, os.getpid())
        assert again.wait(timeout=60) != 0, "no node to drain: the hook must not hold the pod"
    finally:
        ray.shutdown()
        cluster.shutdown()
