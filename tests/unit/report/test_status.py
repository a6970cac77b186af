"""`blip2 status` on outputs during and after a run."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from pipeline.attempts.attempt import Attempt
from pipeline.attempts.refusal import Refusal, keep_refusal
from pipeline.attempts.store import write_attempt
from pipeline.cli import status as command
from pipeline.cli.main import main
from pipeline.inputs.reader import ShardReport
from pipeline.inputs.shards import Shard
from pipeline.ledger.commit import commit_shard
from pipeline.ledger.fragments import write_fragment
from pipeline.ledger.layout import LEASE
from pipeline.ledger.lease import Lease
from pipeline.ledger.ledger import Ledger
from pipeline.ledger.run_record import Run
from pipeline.progress import ProgressSnapshot, choose_style, writing
from pipeline.report.pace import UNKNOWN
from pipeline.report.status import RunStatus
from pipeline.schema import ROW_CONTRACT
from pipeline.settings.fingerprint import Fingerprint
from pipeline.storage.folder import Folder


def write_rows(folder: Folder, shard: str, num_rows: int, failed: int = 0) -> None:
    rows: list[dict[str, Any]] = [
        {"key": f"{n}", "shard": shard, "row": n, "flags": [], "status": "ok" if n >= failed else "too_large"}
        for n in range(num_rows)
    ]
    write_fragment(folder, pa.Table.from_pylist(rows, schema=ROW_CONTRACT))


def finish(folder: Folder, shard: str) -> None:
    commit_shard(folder, ShardReport(shard=shard, num_rows=100, complete=True), {})


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """A run of five shards: one finished with failures, one half done, one known to have 40 rows."""
    folder = Folder(str(tmp_path))
    shards = [Shard(name=f"{n}.tar", format="webdataset", root="/in", files=(f"{n}.tar",)) for n in range(4)]
    shards.append(Shard(name="4~0-39", format="folder", root="/in", files=("x",), num_rows=40))
    Ledger(folder).begin(Run(Fingerprint({}), {}, tuple(shards)))
    write_rows(folder, "0.tar", 100, failed=3)
    finish(folder, "0.tar")
    write_rows(folder, "1.tar", 50)
    return folder


def test_a_run_without_a_driver(folder):
    assert RunStatus.read(folder.uri).lines() == [
        "100 rows = 97 ok + 3 failed (3 too_large)",
        "5 shards = 1 written + 4 left",
        "in progress: 50 rows finished in 1 shard",
        "remaining: about 200 rows, 4 shards",  # 40 + 3 * 70, less the 50 in progress
        UNKNOWN,
        "no driver is running; run the same command to resume",
    ]


def test_a_run_with_a_driver_shows_its_rate_and_its_end(folder, capsys):
    snapshot = ProgressSnapshot(
        num_rows=150,
        num_failed=3,
        images_per_s=12.5,
        shards_done=1,
        num_shards=5,
        left_s=90.0,
        busy={"decode": 0.5},
    )
    lease = Lease(folder)
    lease.progress = lambda: dataclasses.asdict(snapshot) | {"of_a_newer_version": 1}
    with lease:
        assert main(["status", "--output", folder.uri]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("running: process ")
    assert "150 images · 12.5/s · 3 failed · shards 1/5 · ETA 1 min 30 s · busy decode 50%" in last
    assert ", ends about 20" in last


def test_watching_shows_a_run_again_until_its_driver_has_ended(folder, capsys, monkeypatch):
    with contextlib.ExitStack() as stack:
        stack.enter_context(Lease(folder))
        naps: list[float] = []

        def nap(seconds: float) -> None:
            naps.append(seconds)
            if len(naps) == 2:
                stack.close()  # the driver ends

        monkeypatch.setattr(command.time, "sleep", nap)
        assert main(["status", folder.uri, "--watch"]) == 0
    said = capsys.readouterr().out
    assert naps == [command.WATCH_EVERY_S] * 2
    assert said.count("running: process ") == 2
    assert said.endswith("no driver is running; run the same command to resume\n")
    assert main(["status", folder.uri, "--watch"]) == 0, "without a driver it shows the run once"
    assert len(naps) == 2


@pytest.mark.parametrize("error", [errno.EPIPE, errno.ENOSPC])
def test_watching_ends_when_nobody_reads(folder, monkeypatch, error):
    """`blip2 status --watch | head -1` used to continue as long as the run."""

    def refuse(text: str) -> None:
        raise OSError(error, "x")

    with open(os.devnull, "w") as file, Lease(folder):
        broken = SimpleNamespace(isatty=lambda: False, fileno=file.fileno, write=refuse)
        monkeypatch.setattr("sys.stdout", broken)
        monkeypatch.setattr(writing, "_is_read", True)
        monkeypatch.setattr(writing, "_lost", None)
        monkeypatch.setattr(command.time, "sleep", lambda seconds: pytest.fail("it goes on"))
        assert main(["status", folder.uri, "--watch"]) == (1 if error == errno.ENOSPC else 0)


def test_watching_ends_if_nobody_could_ever_read(folder):
    """`blip2 status --watch >&-` used to continue as long as the run."""
    words = [sys.executable, "-m", "pipeline", "status", folder.uri, "--watch"]
    with Lease(folder):
        done = subprocess.run(["/bin/sh", "-c", f"exec {shlex.join(words)} >&-"], timeout=60)
    assert done.returncode == 0


def test_a_driver_of_another_machine_without_a_heartbeat_is_not_watched_forever(folder):
    found = RunStatus.read(folder.uri)
    with Lease(folder):
        assert found.has_driver
        holder = json.loads(folder.get(LEASE))
        folder.put(LEASE, json.dumps(holder | {"machine": "another"}).encode())
        assert found.has_driver
        os.utime(folder.path(LEASE), (1, 1))
        assert not found.has_driver


def test_a_program_reads_how_far_a_run_is(folder, capsys):
    lease = Lease(folder)
    lease.progress = lambda: {"num_rows": 150, "of_a_newer_version": 1}
    with lease:
        assert main(["status", folder.uri, "--json"]) == 0
    choose_style("text")
    found = json.loads(capsys.readouterr().out)
    assert (found["event"], found["num_rows"], found["rows_in_progress"]) == ("status", 100, 50)
    assert (found["by_status"], found["rows_left"]) == ({"ok": 97, "too_large": 3}, 200)
    [driver] = found["drivers"]
    assert driver["num_rows"] == 150 and driver["driver"].startswith("process ")


def test_a_driver_that_cannot_write_its_heartbeat_is_explained(folder, monkeypatch):
    """While the disk is full, the last stored heartbeat says that all is well."""
    with Lease(folder):
        os.utime(folder.path(LEASE), (1, 1))
        last = RunStatus.read(folder.uri).lines()[-1]
        assert last.endswith("the driver, its machine or the network has stopped")
        with monkeypatch.context() as patched:
            patched.setattr(Folder, "_put_once", full)
            last = RunStatus.read(folder.uri).lines()[-1]
    assert last.startswith("running: process ")
    assert "; no heartbeat for " in last and last.endswith("No space left on device")


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_finished_run(folder):
    for shard in ("1.tar", "2.tar", "3.tar", "4~0-39"):
        write_rows(folder, shard, 100)
        finish(folder, shard)
    assert RunStatus.read(folder.uri).lines() == [
        "500 rows = 497 ok + 3 failed (3 too_large)",
        "5 shards = 5 written + 0 missing",
        UNKNOWN,
        "finished",
    ]


def test_a_run_that_has_only_started(tmp_path):
    folder = Folder(str(tmp_path))
    shard = Shard(name="0.tar", format="webdataset", root="/in", files=("0.tar",))
    Ledger(folder).begin(Run(Fingerprint({}), {}, (shard,)))
    assert RunStatus.read(folder.uri).lines()[1:3] == ["1 shard = 0 written + 1 left", "remaining: 1 shard"]


def test_a_folder_without_a_run_is_refused(tmp_path, capsys):
    assert main(["status", "--output", str(tmp_path)]) == 3
    assert "holds no run; pass the folder given as --output" in capsys.readouterr().err


def test_a_job_that_was_refused_since_the_last_attempt_is_named(tmp_path, capsys):
    """The log of a job is lost with its cluster."""
    folder = Folder(str(tmp_path))
    refusal = Refusal("2026-01-31T08:00:00.123+00:00", "blip2 caption", "1", "input must be a folder, got x")
    keep_refusal(folder, refusal)
    assert main(["status", "--output", str(tmp_path)]) == 3
    said = "a job was refused at 2026-01-31 08:00:00 UTC: input must be a folder, got x"
    assert f"holds no run; {said}; pass the folder given as --output" in capsys.readouterr().err
    shard = Shard(name="0.tar", format="webdataset", root="/in", files=("0.tar",))
    Ledger(folder).begin(Run(Fingerprint({}), {}, (shard,)))
    assert said in RunStatus.read(folder.uri).lines()
    write_attempt(folder, Attempt(id="1", run="", begun="2026-01-31T09:00:00.000000+00:00"))
    assert said not in RunStatus.read(folder.uri).lines()
