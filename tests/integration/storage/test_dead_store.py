"""A job that is stopped while its store is dead ends without waiting for it, and leaves no process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pipeline.ledger.scan import scan_output
from pipeline.storage.filesystems import open_filesystem
from pipeline.storage.folder import Folder
from tests.chaos.stores.faulty_s3 import FaultyStore
from tests.integration.inputs import write_tars

ENDS_WITHIN_S = 10.0
WAITS_S = 120.0


@pytest.fixture
def server() -> Iterator[tuple[subprocess.Popen, FaultyStore]]:
    command = [sys.executable, "-m", "tests.chaos.stores.faulty_s3"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        store = FaultyStore(int(process.stdout.readline()))
        open_filesystem(store.uri("bucket"))[0].create_dir("bucket")
        yield process, store
        process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["gone", "no_answer"])
def test_a_job_ends_within_ten_seconds_when_its_store_is_dead(server, tmp_path: Path, number) -> None:
    """Each step of the shutdown used to wait for the store, before the job could know that it was dead."""
    process, store = server
    write_tars(tmp_path / "in", num_tars=2, rows_per_tar=80)
    output, gate, log = store.uri("bucket/out"), tmp_path / "gate", tmp_path / "log"
    gate.touch()
    arguments = {
        "settings": {"input": [str(tmp_path / "in")], "output": output},
        "engine": {"gate": str(gate), "gate_after": 50, "max_batch": 8},
    }
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp", ignore_cleanup_errors=True) as folder:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        with log.open("w") as said:
            driver = subprocess.Popen(
                [sys.executable, "-m", "tests.drive", json.dumps(arguments)],
                stdout=said,
                stderr=subprocess.STDOUT,
                env=kept | {"RAY_TMPDIR": folder},
            )
        try:
            wait_until(lambda: scan_output(Folder(output)).fragments, driver, log)
            started = psutil.Process(driver.pid).children(recursive=True)
            assert started
            process.send_signal(number)
            gate.unlink()  # rows finish that cannot be written
            driver.terminate()
            assert driver.wait(ENDS_WITHIN_S) == 143, log.read_text()
            _, running = psutil.wait_procs(started, timeout=10)
            assert not running
        finally:
            driver.kill()
            process.send_signal(signal.SIGCONT)
    last = log.read_text().splitlines()[-1]
    assert last.startswith("blip2: stopped") and "by SIGTERM" in last and "finished work is kept" in last


def wait_until(condition, driver: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + WAITS_S
    while not condition():
        assert driver.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
