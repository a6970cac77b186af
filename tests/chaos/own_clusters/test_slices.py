"""Two commands on two clusters work on one output; one of them dies and is run again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from blip2_actor.testing import captions_made
from pipeline.ledger.ledger import Ledger
from pipeline.report.status import RunStatus
from pipeline.storage.folder import Folder
from tests.integration.inputs import check_output, write_tars

DEADLINE_S = 120


def start(root: Path, number: int, **engine: object) -> subprocess.Popen:
    """Start the driver of a slice on its own local cluster."""
    settings = {"input": [str(root / "in")], "output": str(root / "out"), "slice": f"{number}/2"}
    arguments = json.dumps({"settings": settings, "engine": {"trace": str(root / "trace"), **engine}})
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with (root / f"log-{number}").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.drive", arguments],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


@pytest.mark.timeout(400)
def test_two_drivers_make_one_output_and_the_death_of_one_costs_no_row(tmp_path: Path):
    truth = write_tars(tmp_path / "in", num_tars=8, rows_per_tar=30)
    first, second = start(tmp_path, 1), start(tmp_path, 2, seconds_per_image=0.2, max_batch=4)
    ledger = Ledger(Folder(str(tmp_path / "out")))
    deadline = time.monotonic() + DEADLINE_S
    while second.poll() is None and time.monotonic() < deadline:
        run = ledger.load()
        part = [] if run is None else [s.name for s in run.shards if s.name in ledger.scan().fragments]
        if first.poll() is not None and part:
            break
        time.sleep(0.2)
    assert first.wait(DEADLINE_S) == 0, (tmp_path / "log-1").read_text()
    assert second.poll() is None, (tmp_path / "log-2").read_text()
    assert any("slice 2/2 running" in line for line in RunStatus.read(str(tmp_path / "out")).lines())
    second.send_signal(signal.SIGKILL)
    second.wait()
    again = start(tmp_path, 2)
    assert again.wait(DEADLINE_S) == 0, (tmp_path / "log-2").read_text()
    check_output(tmp_path / "out", truth)
    assert RunStatus.read(str(tmp_path / "out")).lines()[:2] == [
        "240 rows = 240 ok + 0 failed",
        "8 shards = 8 written + 0 missing",
    ]
    assert 240 <= len(captions_made(tmp_path / "trace")) < 480, "the other slice is not made again"
