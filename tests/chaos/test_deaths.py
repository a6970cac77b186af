"""Each kind of death, once, in the middle of a run on several nodes: all rows are as without it.

A gate stops the engine in the middle, so that each death happens at a known point; no test sleeps.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from pipeline.ledger.scan import scan_output
from pipeline.stages.coordinator import Coordinator
from pipeline.stages.decode import DecodeStage
from pipeline.stages.write import WriteStage
from pipeline.storage.folder import Folder
from tests.chaos.cluster import NODE, cluster, kill, processes, processes_of, start_driver, wait_until
from tests.integration.inputs import check_output, write_tars

SIZE_PX = 448
"""So many pixels that the object stores hold a part of the input: decoding goes on while the gate is shut."""


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    with cluster(num_nodes=2) as made:
        yield made


@dataclass
class Scene:
    """A run that a gate has stopped in the middle."""

    cluster: Cluster
    driver: subprocess.Popen
    folder: Path
    log: Path

    def kill_each(self, what: str) -> None:
        found = wait_until(lambda: processes(self.cluster, what), self.driver, self.log)
        for pid in found:
            kill(pid)
        wait_until(lambda: not set(found) & set(processes(self.cluster, what)), self.driver, self.log)


def kill_decode_children(scene: Scene) -> None:
    scene.kill_each("decode_child")


def kill_decode_actors(scene: Scene) -> None:
    scene.kill_each(DecodeStage.__name__)


def kill_caption_actors(scene: Scene) -> None:
    scene.kill_each(WriteStage.__name__)


def kill_caption_actors_twice(scene: Scene) -> None:
    scene.kill_each(WriteStage.__name__)
    wait_until(lambda: processes(scene.cluster, WriteStage.__name__), scene.driver, scene.log)
    scene.kill_each(WriteStage.__name__)


def kill_the_coordinator(scene: Scene) -> None:
    scene.kill_each(f"ray::{Coordinator.__name__}")


def kill_a_node(scene: Scene) -> None:
    """Remove the node that captions, as when a machine is taken away, and add another."""
    captioning = set(processes(scene.cluster, WriteStage.__name__))
    for node in list(scene.cluster.worker_nodes):
        if captioning & set(processes_of(node, WriteStage.__name__)):
            scene.cluster.remove_node(node, allow_graceful=False)
            scene.cluster.add_node(**NODE)


def kill_the_driver(scene: Scene) -> None:
    scene.driver.kill()


def terminate_the_driver(scene: Scene) -> None:
    scene.driver.send_signal(signal.SIGTERM)


def break_the_disk(scene: Scene) -> None:
    """Make writing fail for a while: a file is in the place of the folder of fragments."""
    fragments = scene.folder / "_blip2" / "fragments"
    aside = scene.folder / "_blip2" / "aside"
    fragments.rename(aside)
    fragments.write_text("in the way")
    (scene.folder.parent / "gate").unlink()
    wait_until(lambda: "trying again" in worker_logs(), scene.driver, scene.log)
    fragments.unlink()
    aside.rename(fragments)


def worker_logs() -> str:
    """Return what all workers have logged; Ray moves the logs of workers that have ended meanwhile."""
    text = ""
    for log in Path(os.environ["RAY_TMPDIR"]).glob("ray/session_latest/logs/worker-*.err"):
        with contextlib.suppress(FileNotFoundError):
            text += log.read_text(errors="replace")
    return text


DEATHS: list[Callable[[Scene], None]] = [
    kill_decode_children,
    kill_decode_actors,
    kill_caption_actors,
    kill_caption_actors_twice,
    kill_the_coordinator,
    kill_a_node,
    kill_the_driver,
    terminate_the_driver,
    break_the_disk,
]


@pytest.mark.parametrize("death", DEATHS, ids=lambda death: death.__name__)
def test_all_rows_come_out_right(nodes: Cluster, tmp_path: Path, death: Callable[[Scene], None]):
    truth = write_tars(tmp_path / "in", num_tars=6, rows_per_tar=100, broken_every=13)
    gate, output, log = tmp_path / "gate", tmp_path / "out", tmp_path / "log"
    gate.touch()
    settings: dict[str, Any] = {
        "input": [str(tmp_path / "in")],
        "output": str(output),
        "max_failed_fraction": 0.5,
        "placement": {"max_actors": 2, "calls_per_actor": 2},
    }
    engine = {
        "image_size_px": SIZE_PX,
        "gate": str(gate),
        "gate_after": 50,
        "trace": str(tmp_path / "trace"),
    }

    driver = start_driver(nodes, settings, engine, log)
    try:
        wait_until(lambda: scan_output(Folder(str(output))).fragments, driver, log)
        death(Scene(nodes, driver, output, log))
        gate.unlink(missing_ok=True)
        if driver.wait() != 0:
            driver = start_driver(nodes, settings, engine, log)
        assert driver.wait() == 0, log.read_text()
    finally:
        driver.kill()
        driver.wait()
    check_output(output, truth, size_px=SIZE_PX)
    left = scan_output(Folder(str(output)))
    assert (dict(left.fragments), left.shard_reports, left.leftovers) == ({}, {}, ())
