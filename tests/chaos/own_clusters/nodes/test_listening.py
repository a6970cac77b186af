"""A cluster's head listens only on the ports that `docs/operating.md` lists."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.chaos.own_clusters.autoscaled import CLUSTER_FILE
from tests.processes import is_loopback

ROOT = Path(__file__).parents[4]
ADDRESS = "10.0.0.1"
"""The head's address, in its own network namespace, where every default port is free."""
FIRST_RANDOM_PORT = 32_768
"""The first port that Linux assigns to a socket that asks for any port."""
PROGRAM = """
import os, subprocess, sys
import psutil, ray, yaml
from ray import serve
from tests.processes import listening_ports

head = subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE, text=True)
try:
    for line in head.stdout:
        if "Ray runtime started" in line:
            break
    ray.init(address="auto", logging_level="error", log_to_driver=False)
    with open("deploy/serve_config.yaml") as file:
        serve.start(http_options=yaml.safe_load(file)["http_options"])
    ray.get(ray.remote(lambda: os.getpid()).remote())
    for address, port in listening_ports(head.pid):
        print("listens:", address, port, flush=True)
    ray.shutdown()
finally:
    for process in [*psutil.Process(head.pid).children(recursive=True), head]:
        process.kill()
"""


def documented_ports() -> list[range]:
    """Return the ports in the first column of the table."""
    table = (ROOT / "docs/operating.md").read_text()
    cells = re.findall(r"^\| (\d[^|]*) \|", table, re.MULTILINE)
    return [
        range(int(first), int(last or first) + 1)
        for cell in cells
        for first, last in re.findall(r"(\d+)(?:–(\d+))?", cell)
    ]


@pytest.mark.timeout(240)
def test_a_head_listens_on_the_ports_that_the_documentation_lists() -> None:
    """The list used to lack the ports of the agent, of workers, and of the dashboard's metrics."""
    with_address = f'ip link set lo up && ip addr add {ADDRESS}/32 dev lo && exec "$0" "$@"'
    in_own_network = ["unshare", "--net", "sh", "-c", with_address]
    if subprocess.run([*in_own_network, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this user may not make a network")
    start = shlex.split(yaml.safe_load(CLUSTER_FILE.read_text())["head_start_ray_commands"][-1])
    # Without the file that lists the machines of a cloud, the autoscaler still listens.
    flags = [flag for flag in start[1:] if not flag.startswith("--autoscaling-config")]
    flags += ["--block", f"--node-ip-address={ADDRESS}", "--num-cpus=4", "--object-store-memory=200000000"]
    done = subprocess.run(
        [*in_own_network, sys.executable, "-c", PROGRAM, sys.executable, "-m", "ray.scripts.scripts", *flags],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 64, "PYTHONPATH": str(ROOT)},
    )
    listening = re.findall(r"^listens: (\S+) (\d+)$", done.stdout, re.MULTILINE)
    ports = {int(port) for _, port in listening}
    documented = documented_ports()
    not_found = [numbers for numbers in documented if ports.isdisjoint(numbers)]
    assert not not_found, (listening, done.stderr)
    with_a_name = set().union(*documented)
    assert all(port in with_a_name or port >= FIRST_RANDOM_PORT for port in ports), listening
    assert all(is_loopback(address) for address, port in listening if port == "8265"), listening
