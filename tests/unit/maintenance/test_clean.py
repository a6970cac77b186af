"""`blip2 clean` deletes what is useless, and never the only copy of a row."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.cli.main import main
from pipeline.inputs.reader import ShardReport
from pipeline.inputs.shards import RunSlice
from pipeline.ledger.fragments import store_shard_report, write_fragment
from pipeline.ledger.layout import LEASE, RUN_FILE, lease_name
from pipeline.ledger.lease import Holder, Lease
from pipeline.ledger.ledger import Ledger
from pipeline.maintenance.clean import clean
from pipeline.maintenance.settings import CleanSettings, VerifySettings
from pipeline.maintenance.verify import verify
from pipeline.progress import choose_style
from pipeline.storage.folder import Folder
from tests.unit.inputs.formats.reading_cases import tar_bytes
from tests.unit.inputs.run_without_ray import retry, run
from tests.unit.ledger.test_fragments import rows
from tests.unit.maintenance.runs import TAR, finished_run

PLANS = ("_blip2/plan-old/0.arrow", "_blip2/plan-new/0.arrow")


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """A finished run after many deaths."""
    folder = Folder(str(finished_run(tmp_path)))
    for name in ("_blip2/tmp/half", "_blip2/probe-1", *PLANS):
        folder.put(name, b"1234")
    os.utime(folder.path(PLANS[0]), (0, 0))
    write_fragment(folder, rows([0], shard="in/0.tar"))  # from a straggler: its rows are in the file
    write_fragment(folder, rows([1], shard="in/0.tar"), generation=2)
    write_fragment(folder, rows([0], shard="gone/0.tar"))
    store_shard_report(folder, ShardReport(shard="gone/0.tar", num_rows=1, complete=True))
    retried = rows([1], shard="in/1.tar", word="retried")  # from a retry: better than the row in the file
    write_fragment(folder, retried.set_column(0, retried.schema.field("key"), pa.array(["y"])))
    dead = dataclasses.replace(Holder.of_this_process(), process_start="1")
    for lease in (LEASE, lease_name(RunSlice(1, 2))):
        folder.put(lease, json.dumps(dataclasses.asdict(dead)).encode())
    return folder


def cleaned(folder: Folder, yes: bool = False) -> int:
    return clean(CleanSettings(output=folder.uri, yes=yes))


def test_it_only_lists_unless_it_is_told_to_delete(folder, capsys):
    before = sorted(folder.names())
    assert cleaned(folder) == 0
    assert sorted(folder.names()) == before
    said = capsys.readouterr().out
    for line in (
        "temporary files of processes that have died: 2 files, 8 bytes",
        "files of plans that were killed: 1 file, 4 bytes",
        "rows of shards that were begun again: 3 files, ",
        "rows that are also in the files of finished shards: 1 file, ",
        "leases of drivers that have died: 2 files, ",
        "    _blip2/probe-1, _blip2/tmp/half",
        "kept: 1 fragment of a retry that was stopped; blip2 retry goes on with them",
        "to be deleted: 9 files, ",
    ):
        assert line in said


def test_what_is_of_no_use_is_deleted_and_a_retry_goes_on_with_the_rest(folder, tmp_path, capsys):
    table = pq.read_table(folder.path(TAR))
    assert cleaned(folder, yes=True) == 0
    assert "deleted: 9 files, " in capsys.readouterr().out
    kept = ("/fragments/in/1.tar.rows/", "/summaries/")
    left = {name for name in folder.names("_blip2") if not any(part in name for part in kept)}
    assert left == {"_blip2/run.json", "_blip2/shards.jsonl.gz", PLANS[1]}
    assert sorted(path.name for path in Path(folder.path("_blip2")).iterdir()) == [
        "fragments",
        "plan-new",
        "run.json",
        "shards.jsonl.gz",
        "summaries",
    ]
    assert all(folders or files for _, folders, files in os.walk(folder.path("_blip2"))), "none is empty"
    assert pq.read_table(folder.path(TAR)).equals(table)
    retry(tmp_path)
    rows_of_other = pq.read_table(folder.path("in/1.tar.parquet")).to_pylist()
    assert rows_of_other[1]["caption"] == "retried 1"
    assert cleaned(folder) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "there is nothing to delete"


def test_no_driver_can_begin_until_all_is_deleted(folder, monkeypatch):
    """A dead driver's lease used to be listed for deletion, under the name of the command's own lease."""
    is_held: list[bool] = []
    drop_markers = Ledger.drop_markers

    def look(ledger: Ledger, *found: Any) -> None:
        is_held.append(folder.file(LEASE) is not None)
        drop_markers(ledger, *found)

    monkeypatch.setattr(Ledger, "drop_markers", look)
    assert cleaned(folder, yes=True) == 0
    assert is_held == [True] and folder.file(LEASE) is None


@pytest.mark.parametrize("yes", [False, True])
def test_it_is_refused_while_a_driver_is_at_work(folder, yes, capsys):
    folder.delete(LEASE)
    with Lease(folder):
        before = sorted(folder.names())
        assert cleaned(folder, yes) == 1
        assert sorted(folder.names()) == before
    assert "output must have no driver while it is cleaned" in capsys.readouterr().err


def test_it_keeps_the_rows_of_shards_that_another_driver_has_just_added(tmp_path, monkeypatch, capsys):
    """The run used to be loaded before the lease was taken."""
    folder = Folder(str(finished_run(tmp_path)))
    (tmp_path / "in" / "2.tar").write_bytes(tar_bytes([("n.jpg", b"new")]))

    def take_late(lease: Lease) -> Lease:
        monkeypatch.undo()
        inputs = (str(tmp_path / "in"), str(tmp_path / "pictures"))
        run(tmp_path, input=inputs, add_new=True)
        write_fragment(folder, rows([0], shard="in/2.tar"))
        return take(lease)

    take = Lease.__enter__
    monkeypatch.setattr(Lease, "__enter__", take_late)
    assert cleaned(folder, yes=True) == 1
    assert "whose run has other shards since" in capsys.readouterr().err
    assert [name for name in folder.names() if name.startswith("_blip2/fragments/in/2.tar")]


def test_a_driver_of_another_machine_counts_while_its_heartbeat_is_young(folder, capsys):
    other = dataclasses.replace(Holder.of_this_process(), machine="another")
    folder.put(LEASE, json.dumps(dataclasses.asdict(other)).encode())
    assert cleaned(folder) == 1
    os.utime(folder.path(LEASE), (1, 1))
    assert cleaned(folder) == 0
    assert "leases of drivers that have died: 2 files" in capsys.readouterr().out


def test_a_run_that_is_not_finished_keeps_its_rows(folder, capsys):
    Path(folder.path(TAR)).unlink()
    assert cleaned(folder, yes=True) == 0
    assert [name for name in folder.names() if "/fragments/in/0.tar.rows/" in name]


def test_a_folder_without_a_run_loses_only_what_a_plan_has_left(tmp_path, capsys):
    (tmp_path / "mine").write_text("mine")
    assert cleaned(Folder(str(tmp_path)), yes=True) == 3
    assert "holds no run" in capsys.readouterr().err
    folder = Folder(str(tmp_path))
    folder.put(PLANS[0], b"1234")
    os.utime(folder.path(PLANS[0]), (0, 0))
    assert cleaned(Folder(str(tmp_path)), yes=True) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["mine", "_blip2"]
    assert folder.names("_blip2") == []


@pytest.mark.parametrize("lists", [("shards-0123ef.jsonl.gz",), ("shards-ab.jsonl.gz", "shards.jsonl.gz")])
def test_lists_of_shards_that_no_run_reads_are_deleted(tmp_path, capsys, lists):
    """A slice's driver that dies before it has begun the run leaves its list, which used to be overlooked."""
    folder = Folder(str(tmp_path))
    names = [f"_blip2/{name}" for name in lists]
    for name in names:
        folder.put(name, b"list")
    assert cleaned(folder, yes=True) == 0, "nothing has begun a run here"
    assert f"lists of shards of runs that were never begun: {len(names)} file" in capsys.readouterr().out
    assert folder.names() == []


def test_the_list_of_shards_stays_if_the_record_of_a_run_with_rows_is_lost(folder, capsys):
    """With a copy of `run.json` the run can continue."""
    record = folder.get(RUN_FILE)
    folder.delete(RUN_FILE)
    assert cleaned(folder, yes=True) == 0
    folder.put(RUN_FILE, record)
    assert main(["status", folder.uri]) == 0


def test_the_list_of_shards_of_the_run_stays(folder, capsys):
    folder.put("_blip2/shards-0123456789abcdef.jsonl.gz", b"list")
    folder.put("_blip2/shards-notes.txt", b"of the user")
    assert verify(VerifySettings(output=folder.uri)) == 0
    assert "1 file of no use: lists of shards" in capsys.readouterr().out
    assert cleaned(folder, yes=True) == 0
    kept = [name for name in folder.names() if name.startswith("_blip2/shards")]
    assert sorted(kept) == ["_blip2/shards-notes.txt", "_blip2/shards.jsonl.gz"]
    assert main(["status", folder.uri]) == 0


def test_a_program_reads_what_is_to_be_deleted(folder, capsys):
    assert main(["clean", folder.uri, "--json"]) == 0
    choose_style("text")
    found = json.loads(capsys.readouterr().out)
    assert (found["event"], found["is_deleted"]) == ("clean", False)
    assert found["num_bytes"] > 0 and any(LEASE in names for names in found["files"].values())
