"""A job whose input or output is hidden on one node by another disk is refused, and writes nothing."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.cluster import cluster, descendants, kill, start_driver
from tests.integration.inputs import write_tars

SEPARATE = ["unshare", "-m"]
"""Runs a command in its own mount namespace."""


@pytest.fixture
def private(tmp_path: Path) -> Path:
    """Return a folder over which the node mounts another disk."""
    folder = tmp_path / "private"
    folder.mkdir()
    mount = [*SEPARATE, "mount", "-t", "tmpfs", "none", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount")
    return folder


@pytest.fixture
def head_and_private_node(own_ray: None, private: Path) -> Iterator[Any]:
    with cluster(num_nodes=0) as head:
        start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--address={head.address}"]
        start += ["--num-cpus=2", "--object-store-memory=100000000", "--disable-usage-stats"]
        start += ["--min-worker-port=0", "--max-worker-port=0"]
        in_own_mounts = f"mount -t tmpfs none {shlex.quote(str(private))} && exec {shlex.join(start)}"
        node = subprocess.Popen([*SEPARATE, "sh", "-c", in_own_mounts], stdout=subprocess.DEVNULL)
        try:
            yield head
        finally:
            for pid in [*descendants(node.pid), node.pid]:
                kill(pid)
            node.wait()


@pytest.mark.timeout(300)
def test_what_a_node_does_not_share_is_refused_and_nothing_is_written(
    head_and_private_node: Any, private: Path, tmp_path: Path
) -> None:
    """The job used to lose all its captions, or count an input that workers do not see as finished."""
    write_tars(tmp_path / "shared", num_tars=2, rows_per_tar=5)
    write_tars(private / "in", num_tars=2, rows_per_tar=5)
    for name, images, output in (
        ("output", tmp_path / "shared", private / "out"),
        ("input", private / "in", tmp_path / "out"),
    ):
        log = tmp_path / f"{name}.log"
        settings = {"input": [str(images)], "output": str(output)}
        driver = start_driver(head_and_private_node, settings, {}, log)
        assert driver.wait() == 3, log.read_text()
        said = log.read_text()
        assert f"blip2: --{name} must be storage that all nodes share, got " in said, said
        assert not [path for path in output.rglob("*") if path.is_file()], "nothing is written"
