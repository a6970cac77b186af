"""How a stopped or waiting job ends: the work that is kept, the last sentence, the exit status.

The endings that need no cluster are in tests/unit/cli/test_refusals.py.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from pipeline.ledger.layout import LEASE
from pipeline.ledger.scan import scan_output
from pipeline.storage.folder import Folder
from tests.chaos.cluster import cluster, start_driver, wait_until
from tests.integration.inputs import write_tars

ENDS_WITHIN_S = 10.0


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    with cluster(num_nodes=1) as made:
        yield made


@dataclass
class Scene:
    """A running job that has written a fragment; a gate holds the rows that follow."""

    driver: subprocess.Popen
    output: Path
    log: Path

    def waits_for_storage(self) -> bool:
        return "output has been failing" in self.log.read_text()


def send(number: signal.Signals) -> Callable[[Scene], None]:
    return lambda scene: scene.driver.send_signal(number)


def terminate_while_the_output_fails(scene: Scene) -> None:
    """Replace the folder of fragments by a file, then open the gate, so that rows cannot be written."""
    fragments = scene.output / "_blip2" / "fragments"
    fragments.rename(scene.output / "_blip2" / "aside")
    fragments.write_text("in the way")
    (scene.output.parent / "gate").unlink()
    wait_until(scene.waits_for_storage, scene.driver, scene.log)
    scene.driver.send_signal(signal.SIGTERM)


STOPPED = "blip2: stopped by {}; finished work is kept; run the same command to resume"
ENDINGS: list[tuple[str, Callable[[Scene], None], str, int]] = [
    ("Ctrl-C", send(signal.SIGINT), STOPPED.format("SIGINT"), 130),
    ("a preempted machine", send(signal.SIGTERM), STOPPED.format("SIGTERM"), 143),
    ("a closed terminal", send(signal.SIGHUP), STOPPED.format("SIGHUP"), 129),
    (
        "a signal while the output fails",
        terminate_while_the_output_fails,
        STOPPED.format("SIGTERM"),
        143,
    ),
    ("a deadline", lambda scene: None, STOPPED.format("--deadline"), 143),
]


@pytest.mark.parametrize(
    ("what", "do", "sentence", "status"), ENDINGS, ids=[what.replace(" ", "_") for what, *_ in ENDINGS]
)
def test_a_job_ends_soon_with_its_sentence(
    nodes: Cluster, tmp_path: Path, what: str, do: Callable[[Scene], None], sentence: str, status: int
) -> None:
    write_tars(tmp_path / "in", num_tars=2, rows_per_tar=80)
    output, log, gate = tmp_path / "out", tmp_path / "log", tmp_path / "gate"
    gate.touch()
    settings: dict[str, Any] = {"input": [str(tmp_path / "in")], "output": str(output)}
    if what == "a deadline":
        settings["deadline"] = "45s"
    driver = start_driver(nodes, settings, {"gate": str(gate), "gate_after": 50, "max_batch": 8}, log)
    try:
        wait_until(lambda: scan_output(Folder(str(output))).fragments, driver, log)
        do(Scene(driver, output, log))
        assert driver.wait(60 if what == "a deadline" else ENDS_WITHIN_S) == status, log.read_text()
    finally:
        driver.kill()
    said = log.read_text()
    assert said.splitlines()[-1] == sentence, said
    assert "Traceback" not in said
    assert not os.path.exists(output / LEASE), "the next start would wait for this one"
