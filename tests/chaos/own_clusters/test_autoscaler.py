"""Ray's real autoscaler, from the committed cluster file: accelerators from zero, busy, added, lost, refused.

The engine is a fake, so the accelerators are only resources of Ray. Decisions that were made once, from the
nodes at the start of the job, used to fail here: the job captioned on CPUs to its end.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.ledger.ledger import Ledger
from pipeline.storage.folder import Folder
from tests.chaos.cluster import DEADLINE_S, descendants, kill, start_driver, wait_until
from tests.chaos.own_clusters.autoscaled import Autoscaled, autoscaled
from tests.chaos.own_clusters.log_sentences import assert_said
from tests.integration.inputs import check_output, write_tars

MAX_ACCELERATORS = 2
REFUSED_WITHIN_S = 30
SLOW = {"dtype": "auto", "seconds_per_image": 0.05, "max_batch": 8}


@pytest.fixture(scope="module")
def cluster(own_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Autoscaled]:
    with autoscaled(tmp_path_factory.mktemp("head"), MAX_ACCELERATORS) as made:
        ray.init(address=made.address, log_to_driver=False)
        try:
            yield made
        finally:
            ray.shutdown()


@pytest.fixture(autouse=True)
def no_driver_left() -> Iterator[None]:
    """End the driver of a failed test, which would hold the accelerators of the next test."""
    yield
    for process in psutil.Process().children():
        if process.status() != psutil.STATUS_ZOMBIE and "tests.drive" in process.cmdline():
            process.kill()


def wait(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + DEADLINE_S
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    return value


def raylet_of(node: dict[str, Any]) -> int:
    """Return the raylet of a node: the parent of its workers."""
    on_node = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    return ray.get(ray.remote(_parent).options(num_cpus=0, scheduling_strategy=on_node).remote())


def _parent() -> int:
    return os.getppid()


@pytest.mark.timeout(600)
def test_without_a_flag_accelerators_come_from_zero_a_lost_one_costs_nothing_and_all_go(
    cluster: Autoscaled, tmp_path: Path
) -> None:
    # Enough work for both workers, however late the second starts: Ray Data drops a worker that finds none.
    truth = write_tars(tmp_path / "in", num_tars=8, rows_per_tar=240)
    placement = {"calls_per_actor": 1}
    settings = {"input": [str(tmp_path / "in")], "output": str(tmp_path / "out"), "placement": placement}
    log, trace, gate = tmp_path / "log", tmp_path / "trace", tmp_path / "gate"
    gate.touch()
    trace.mkdir()
    assert not cluster.nodes("GPU")
    engine = {"dtype": "auto", "trace": str(trace), "gate": str(gate), "gate_after": 20}
    driver = start_driver(cluster, settings, engine, log)
    # Pause the autoscaler between the first CPU node and the first accelerator, until the job waits.
    wait_until(lambda: cluster.nodes("CPU"), driver, log)
    with cluster.paused_autoscaler():
        wait_until(lambda: "waiting for the first captioning worker" in log.read_text(), driver, log)
    nodes = wait_until(
        lambda: found if len(found := cluster.nodes("GPU")) == MAX_ACCELERATORS else None, driver, log
    )
    have_captioned = lambda: [path for path in trace.iterdir() if path.stat().st_size]  # noqa: E731
    wait_until(lambda: len(have_captioned()) == MAX_ACCELERATORS, driver, log)
    wait_until(lambda: "; 2 at work" in log.read_text(), driver, log)
    kill(raylet_of(nodes[0]))
    wait_until(lambda: "its node is gone; 1 captioning worker left" in log.read_text(), driver, log)
    regained = lambda: "ready; 2 at work" in log.read_text().partition("its node is gone")[2]  # noqa: E731
    wait_until(regained, driver, log)
    gate.unlink()
    assert driver.wait() == 0, log.read_text()
    check_output(tmp_path / "out", truth)
    assert_said(
        log,
        "waiting for the first captioning worker (1 GPU) since …",
        "…; 2 at work",
        "captioning worker … was lost: its node is gone; 1 captioning worker left, and its images go again",
        "captioning worker … on … is ready; 2 at work",
        "1 attempt, … UTC to … UTC: 1,920 rows in … of work (… rows/s)",
    )
    assert_said(  # in any order relative to the sentences about its worker
        log,
        "node … (1 CPU, 1 GPU) was lost: …; the cluster has … nodes left",
        "node … (1 CPU, 1 GPU) joined; the cluster has … nodes",
    )
    dtype = Ledger(Folder(str(tmp_path / "out"))).require_run().fingerprint.parts["dtype"]
    assert dtype == "bfloat16", "what the accelerator computes in, and not the driver"
    wait(lambda: not cluster.nodes("GPU") and not cluster.nodes("CPU"))


@pytest.mark.timeout(600)
def test_a_second_driver_is_refused_and_a_stopped_run_says_what_is_kept_and_resumes(
    cluster: Autoscaled, tmp_path: Path
) -> None:
    truth = write_tars(tmp_path / "in", num_tars=2, rows_per_tar=40)
    settings = {"input": [str(tmp_path / "in")], "output": str(tmp_path / "out")}
    first, second, resumed = (tmp_path / name for name in ("first.log", "second.log", "resumed.log"))
    gate, trace = tmp_path / "gate", tmp_path / "trace"
    gate.touch()
    trace.mkdir()
    engine = {"dtype": "auto", "trace": str(trace), "gate": str(gate), "gate_after": 10}
    driver = start_driver(cluster, settings, engine, first)
    wait_until(lambda: any(path.stat().st_size for path in trace.iterdir()), driver, first)
    assert start_driver(cluster, settings, engine, second).wait() == 1, second.read_text()
    assert_said(
        second,
        f"blip2: --output must have one driver at a time, got {tmp_path / 'out'} while process … on …, "
        "started … works on it; wait for it, stop it, or give another --output",
    )
    wait_until(lambda: list((tmp_path / "out").rglob("*.arrow")), driver, first)
    kill(driver.pid, signal.SIGTERM)
    assert driver.wait() == 143, first.read_text()
    assert_said(
        first,
        "SIGTERM: writing what is finished, for at most 7 s; Ctrl-C ends it at once",
        "1 attempt, … UTC to … UTC: … rows in … of work…",
        "blip2: stopped by SIGTERM; finished work is kept; run the same command to resume",
    )
    gate.unlink()
    assert start_driver(cluster, settings, engine, resumed).wait() == 0, resumed.read_text()
    check_output(tmp_path / "out", truth)
    assert_said(
        resumed,
        "attempt 2 of run …; before it: 1 attempt, … UTC to … UTC: … rows in … of work…",
        "2 attempts, … UTC to … UTC: 80 rows in … of work…",
    )


@pytest.mark.timeout(600)
def test_while_all_accelerators_are_busy_the_job_says_so_and_a_node_added_by_hand_is_used(
    cluster: Autoscaled, tmp_path: Path
) -> None:
    truth = write_tars(tmp_path / "in", num_tars=2, rows_per_tar=20)
    busy = [ray.remote(Busy).options(num_cpus=0, num_gpus=1).remote() for _ in range(MAX_ACCELERATORS)]
    ray.get([actor.ready.remote() for actor in busy])
    settings = {"input": [str(tmp_path / "in")], "output": str(tmp_path / "out")}
    log = tmp_path / "log"
    driver = start_driver(cluster, settings, SLOW, log)
    said = "has room for 1 × 1 GPU"
    wait_until(lambda: said in log.read_text(), driver, log)
    command = [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "start",
        "--block",
        f"--address={cluster.address}",
    ]
    command += ["--num-cpus=2", "--num-gpus=1", "--object-store-memory=100000000", "--disable-usage-stats"]
    command += ["--min-worker-port=0", "--max-worker-port=0", "--labels=added=by-hand"]
    added = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    try:
        assert driver.wait() == 0, log.read_text()
    finally:
        for pid in [*descendants(added.pid), added.pid]:
            kill(pid)
        added.wait()
    check_output(tmp_path / "out", truth)
    assert_said(
        log,
        "waiting for the first captioning worker (1 GPU) since … UTC; the autoscaler says that no node it "
        "may start has room for 1 × 1 GPU",
        "captioning worker … on … is ready; 1 at work",
    )


class Busy:
    """Holds an accelerator for another user."""

    def ready(self) -> bool:
        return True


@pytest.mark.timeout(600)
def test_another_accelerator_is_started_by_its_name(cluster: Autoscaled, tmp_path: Path) -> None:
    truth = write_tars(tmp_path / "in", num_tars=1, rows_per_tar=10)
    placement = {"accelerator": "NPU=1", "decode_label": ["pool=cpu"]}
    settings = {"input": [str(tmp_path / "in")], "output": str(tmp_path / "out"), "placement": placement}
    driver = start_driver(cluster, settings, {}, tmp_path / "log")
    wait_until(lambda: cluster.nodes("NPU"), driver, tmp_path / "log")
    assert driver.wait() == 0, (tmp_path / "log").read_text()
    check_output(tmp_path / "out", truth)


def test_an_accelerator_that_no_node_type_has_is_refused(cluster: Autoscaled, tmp_path: Path) -> None:
    """The job used to wait forever."""
    write_tars(tmp_path / "in", num_tars=1, rows_per_tar=2)
    settings = {"input": [str(tmp_path / "in")], "output": str(tmp_path / "out")}
    started = time.monotonic()
    log = tmp_path / "log"
    driver = start_driver(cluster, settings | {"placement": {"accelerator": "TPU=4"}}, {}, log)
    assert driver.wait() == 3, log.read_text()
    assert time.monotonic() - started < REFUSED_WITHIN_S
    assert_said(
        log,
        "blip2: a captioning actor needs 4 TPU, and no node offers it: the cluster has …, and its autoscaler "
        "may add nodes with … 1 GPU (accelerator) …; start such nodes, name what they have with "
        "--accelerator NAME=N, or add --device cpu to caption on CPUs",
    )
    assert not list((tmp_path / "out").rglob("*.json"))


@pytest.mark.timeout(600)
def test_an_accelerator_that_torch_cannot_use_is_refused(cluster: Autoscaled, tmp_path: Path) -> None:
    """The engine used to caption silently on the CPU next to the accelerator."""
    write_tars(tmp_path / "in", num_tars=1, rows_per_tar=2)
    command = [
        sys.executable,
        "-m",
        "pipeline",
        "caption",
        "--model",
        "demo",
        "--input",
        str(tmp_path / "in"),
    ]
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "out")],
        env=os.environ | {"RAY_ADDRESS": cluster.address},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3, done.stderr
    assert "the accelerator must be one that torch can use, got 1 GPU on " in done.stderr
    assert "torch 2." in done.stderr and "driver" in done.stderr and done.stderr.count("\n") == 1
    assert not list((tmp_path / "out").rglob("*.json"))
