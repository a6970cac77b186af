"""A driver is killed: the same command resumes, and rows already in a fragment are not captioned again."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray

from blip2_actor.testing import captions_made
from pipeline.attempts.attempt import STAGES
from pipeline.attempts.store import read_attempts
from pipeline.ledger.fragments import read_fragment
from pipeline.ledger.scan import scan_output
from pipeline.report.pace import attempt_lines
from pipeline.report.status import RunStatus
from pipeline.storage.folder import Folder
from tests.integration.inputs import check_output, write_tars

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture
def start() -> Iterator[Callable[[dict, dict], subprocess.Popen]]:
    """Start the caption command on the tests' Ray; kill it at the end if it still runs."""
    started: list[subprocess.Popen] = []

    def run(settings: dict, engine: dict) -> subprocess.Popen:
        arguments = json.dumps({"settings": settings, "engine": engine})
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "tests.drive", arguments],
                env={**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
        return started[-1]

    yield run
    for process in started:
        with process:  # closes the pipe
            process.kill()


def wait_until(condition: Callable[[], object], driver: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert driver.poll() is None, driver.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def check_attempts(folder: Folder, number: signal.Signals) -> None:
    """Both attempts are recorded, each with its own rows; a copy of the output reports the same."""
    killed, last = attempts = read_attempts(folder)
    assert killed.exit_status == (None if number == signal.SIGKILL else 143)
    assert (last.exit_status, last.reason) == (0, "all shards are finished")
    assert killed.id != last.id and killed.run == last.run and killed.rows > 0 and last.rows > 0
    assert attempts.rows <= 180 and (number == signal.SIGKILL or attempts.rows == 180)
    assert list(last.phases) == ["open the output", "start Ray", "load the model", "first row"]
    assert last.hardware["cpus"] and set(last.points[-1].busy_s) == set(STAGES)
    assert attempts.rows_per_s == attempts.rows / attempts.active_s
    copy = shutil.copytree(folder.uri, f"{folder.uri}-copy")
    assert attempt_lines(read_attempts(Folder(copy))) == attempt_lines(attempts)


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_driver_killed_in_the_middle(tmp_path: Path, number: signal.Signals, start):
    truth = write_tars(tmp_path / "in", num_tars=3, rows_per_tar=60, broken_every=11)
    gate, trace, output = tmp_path / "gate", tmp_path / "trace", tmp_path / "out"
    gate.touch()
    settings = {
        "input": [str(tmp_path / "in")],
        "output": str(output),
        "max_failed_fraction": 0.5,
        "placement": {"calls_per_actor": 1},
    }
    engine = {"trace": str(trace), "gate": str(gate), "gate_after": 70}
    folder = Folder(str(output))

    first = start(settings, engine)
    wait_until(lambda: scan_output(folder).finished and scan_output(folder).fragments, first)
    second = start(settings, engine)
    said, _ = second.communicate()
    assert second.returncode == 1
    assert f"process {first.pid}" in said

    assert f"running: process {first.pid}" in RunStatus.read(str(output)).lines()[-1]

    first.send_signal(number)
    said, _ = first.communicate()
    assert first.returncode == (-number if number == signal.SIGKILL else 143), said
    assert ("stopped by SIGTERM; finished work is kept" in said) == (number == signal.SIGTERM), said
    state = scan_output(folder)
    finished_before = {
        caption
        for fragments in state.fragments.values()
        for rows in (read_fragment(folder, fragment.name) for fragment in fragments)
        if rows is not None
        for caption in rows["caption"].to_pylist()
    }
    files_before = {shard: (output / f"{shard}.parquet").stat().st_mtime_ns for shard in state.finished}
    assert len(state.finished) < 3

    last = RunStatus.read(str(output)).lines()[-1]
    assert last.startswith("no driver is running") and last.endswith("run the same command to resume")
    assert ("has died" in last) == (number == signal.SIGKILL), said

    gate.unlink()
    again = start(settings, engine)
    said, _ = again.communicate()
    assert again.returncode == 0, said
    check_output(output, truth)
    assert RunStatus.read(str(output)).lines()[-1] == "finished"
    check_attempts(folder, number)
    made = Counter(captions_made(trace))
    assert all(made[caption] == 1 for caption in finished_before - {None})
    for shard, changed in files_before.items():
        assert (output / f"{shard}.parquet").stat().st_mtime_ns == changed, (
            "a finished shard was written again"
        )
