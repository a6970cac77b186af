"""`blip2 verify`: each provoked fault must be named with its remedy. A missed one means lost data."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.cli.main import main
from pipeline.cli.status import status
from pipeline.ledger.commit import RUN_KEY, SUMMARY_KEY
from pipeline.ledger.fragments import write_fragment
from pipeline.ledger.lease import Lease
from pipeline.maintenance.settings import VerifySettings
from pipeline.maintenance.verify import verify
from pipeline.schema import FINGERPRINT_KEY
from pipeline.settings.report_settings import StatusSettings
from pipeline.storage.folder import Folder
from tests.unit.inputs.formats.reading_cases import tar_bytes
from tests.unit.inputs.run_without_ray import retry, run
from tests.unit.ledger.test_fragments import rows
from tests.unit.maintenance.runs import FOLDER, OTHER, TAR, finished_run

AGAIN = "run the same command again"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("verified")
    finished_run(root)
    return root


@pytest.fixture
def root(finished: Path, tmp_path: Path) -> Path:
    """A copy of the output for a test to damage; its input is where the run has read it."""
    shutil.copytree(finished / "out", tmp_path / "out")
    return tmp_path


def verified(root: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    code = verify(VerifySettings(output=str(root / "out"), json=True))
    return code, json.loads(capsys.readouterr().out)


def rewrite(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    """Rewrite a file with other rows, other columns or another footer."""
    footer = {key: value for key, value in pq.read_metadata(path).metadata.items() if key != b"ARROW:schema"}
    table = change(pq.read_table(path).replace_schema_metadata(footer))
    with pq.ParquetWriter(path, table.schema.remove_metadata()) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata(table.schema.metadata)


def with_footer(key: bytes, value: bytes) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.replace_schema_metadata({**table.schema.metadata, key: value})


def with_column(name: str, values: list[Any], kind: pa.DataType) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        return table.set_column(table.schema.get_field_index(name), name, pa.array(values, kind))

    return change


def summary_with(**changes: Any) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        summary = json.loads(table.schema.metadata[SUMMARY_KEY]) | changes
        return with_footer(SUMMARY_KEY, json.dumps(summary).encode())(table)

    return change


def flip_a_byte(path: Path) -> None:
    """Damage the content of a page, as a bad disk does; lengths and the footer stay right."""
    content = bytearray(path.read_bytes())
    position = content.index(b"\x28\xb5\x2f\xfd") + 12  # zstd's magic number
    content[position] ^= 0xFF
    path.write_bytes(content)


def test_an_output_without_a_fault(root, capsys):
    assert main(["verify", "--output", str(root / "out")]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "7 rows = 6 ok + 1 failed (1 undecodable)",
        "3 shards = 3 written + 0 missing",
        f"3 files of {root / 'out'} read: no fault",
    ]
    assert verified(root, capsys)[1]["by_status"] == {"ok": 6, "undecodable": 1}


@pytest.mark.parametrize(
    ("file", "damage", "found", "remedy"),
    [
        (TAR, lambda path: os.truncate(path, path.stat().st_size // 2), "cannot be read: ", AGAIN),
        (TAR, lambda path: path.write_bytes(b""), "cannot be read: ", AGAIN),
        (TAR, flip_a_byte, "cannot be read: ", AGAIN),
        (TAR, lambda path: pq.write_table(pa.table({"a": [1]}), path), "has no footer of a run", AGAIN),
        (TAR, lambda path: shutil.copy(path.with_name("1.tar.parquet"), path), "the shard in/1.tar", AGAIN),
        (
            TAR,
            lambda path: rewrite(path, lambda table: pa.concat_tables([table.slice(0, 2), table.slice(1)])),
            "must hold the rows 0, 1, 2 and so on; after row 1 comes row 1",
            AGAIN,
        ),
        (
            TAR,
            lambda path: rewrite(path, lambda table: table.take([0, 2, 1])),
            "must hold the rows 0, 1, 2 and so on; after row 0 comes row 2",
            AGAIN,
        ),
        (
            TAR,
            lambda path: rewrite(path, lambda table: table.slice(0, 2)),
            "holds 2 rows, and its footer says 3",
            AGAIN,
        ),
        (
            OTHER,
            lambda path: rewrite(path, summary_with(by_status={"ok": 2})),
            "holds 1 ok + 1 undecodable, and its footer says 2 ok",
            AGAIN,
        ),
        (
            FOLDER,
            lambda path: rewrite(path, lambda table: summary_with(num_rows=1)(table).slice(0, 1)),
            "holds 1 row, and its shard was listed with 2",
            AGAIN,
        ),
        (
            FOLDER,
            lambda path: rewrite(path, with_column("key", ["p.jpg", "r.jpg"], pa.string())),
            "has the key r.jpg in row 1, where q.jpg was listed",
            AGAIN,
        ),
        (
            FOLDER,
            lambda path: rewrite(path, with_column("shard", ["pictures~0-1", "x"], pa.string())),
            "holds rows of another shard",
            AGAIN,
        ),
        (
            TAR,
            lambda path: rewrite(path, with_column("caption", ["a", None, "c"], pa.string())),
            "holds rows that are ok without a caption",
            AGAIN,
        ),
        (TAR, lambda path: rewrite(path, lambda t: t.drop(["status"])), "lacks the column status", AGAIN),
        (
            TAR,
            lambda path: rewrite(path, with_column("width", [1.0] * 3, pa.float32())),
            "has the column width with the type float instead of int32",
            AGAIN,
        ),
        (
            TAR,
            lambda path: rewrite(
                path,
                lambda t: with_footer(RUN_KEY, b'{"prompt": "x"}')(with_footer(FINGERPRINT_KEY, b"1")(t)),
            ),
            "was made with other settings than the run: ",
            AGAIN,
        ),
        (
            TAR,
            lambda path: rewrite(path, summary_with(generation=1)),
            "was made of another content of its input",
            AGAIN,
        ),
        ("more.parquet", lambda path: path.write_bytes(b"x"), "belongs to no shard of the run", "move it"),
    ],
)
def test_a_faulty_file_is_named_with_the_fault_and_the_remedy(root, capsys, file, damage, found, remedy):
    damage(root / "out" / file)
    code, document = verified(root, capsys)
    (finding,) = document["findings"]
    assert (code, finding["subject"], finding["verdict"]) == (1, file, "fail")
    assert found in finding["found"]
    assert remedy in finding["remedy"]


def test_swapped_files_are_told_the_names_that_they_had(root, capsys):
    first, second = root / "out" / TAR, root / "out" / OTHER
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(kept)
    code, document = verified(root, capsys)
    assert (code, document["num_faults"]) == (1, 2)
    remedies = {finding["subject"]: finding["remedy"] for finding in document["findings"]}
    assert remedies[TAR].startswith(f"give it the name {OTHER} again")
    assert remedies[OTHER].startswith(f"give it the name {TAR} again")


def test_a_missing_file_is_a_fault_unless_a_driver_is_at_work(root, capsys):
    (root / "out" / TAR).unlink()
    code, document = verified(root, capsys)
    assert (code, document["num_left"]) == (1, 1)
    assert document["findings"][0]["found"] == "1 shard of 3 have no file: in/0.tar"
    assert AGAIN in document["findings"][0]["remedy"]
    with Lease(Folder(str(root / "out"))):
        code, document = verified(root, capsys)
    assert (code, document["num_faults"]) == (0, 0)
    assert document["findings"][0]["found"].startswith("is at work: process ")


def test_the_damaged_file_is_made_again_by_what_the_remedy_says(tmp_path, capsys):
    out = finished_run(tmp_path)
    inputs = (str(tmp_path / "in"), str(tmp_path / "pictures"))
    before = pq.read_table(out / TAR)
    flip_a_byte(out / TAR)
    (out / TAR).unlink()
    run(tmp_path, input=inputs)
    assert pq.read_table(out / TAR).equals(before)
    assert verified(tmp_path, capsys)[0] == 0


def test_a_damaged_fragment_and_leftovers_are_told(root, capsys):
    folder = Folder(str(root / "out"))
    (root / "out" / TAR).unlink()
    fragment = write_fragment(folder, rows([0], shard="in/0.tar"))
    folder.put(fragment.name, b"damaged")
    folder.put("_blip2/tmp/half", b"")
    write_fragment(folder, rows([0], shard="in/0.tar"), generation=3)
    write_fragment(folder, rows([0], shard="pictures~0-1"))
    write_fragment(folder, rows([1], shard="in/1.tar"))
    (root / "out" / "notes.txt").write_text("mine")
    (root / "out" / "_SUCCESS").write_text("")
    code, document = verified(root, capsys)
    faults = [finding for finding in document["findings"] if finding["verdict"] == "fail"]
    assert code == 1
    assert [finding["subject"] for finding in faults] == ["run", fragment.name]
    told = "\n".join(f"{finding['found']}: {finding['remedy']}" for finding in document["findings"])
    assert "1 file of no use: temporary files of processes that have died" in told
    assert "1 file of no use: rows of shards that were begun again" in told
    assert "1 file of no use: rows that are also in the files of finished shards" in told
    assert "1 fragment of a retry that was stopped, in 1 shard: run blip2 retry again" in told
    assert "1 file of no run: notes.txt" in told


def test_an_input_that_has_changed_is_a_fault_and_one_that_is_gone_is_told(tmp_path, capsys):
    finished_run(tmp_path)
    _change_in_place(tmp_path / "in/0.tar")
    (tmp_path / "pictures/q.jpg").unlink()
    (tmp_path / "in/1.tar").write_bytes(b"another tar")
    (tmp_path / "pictures/new.jpg").write_text("new")
    code, document = verified(tmp_path, capsys)
    found = {
        (f["subject"], f["verdict"]): f["found"] for f in document["findings"] if f["subject"] != "input"
    }
    assert code == 1
    assert found["in/1.tar", "fail"].startswith("its input has changed since the run began: 11 bytes, ")
    assert found["in/0.tar", "fail"].endswith("other bytes than the run has read, and the same size and time")
    told = [f["found"] for f in document["findings"] if f["subject"] == "input"]
    assert any("can no longer be found: q.jpg" in line for line in told)
    assert any("1 new file: new.jpg" in line for line in told)


def test_a_file_that_is_gone_hides_no_other_of_its_name(tmp_path, capsys):
    """The bytes of y/a.tar used not to be compared if x/a.tar was missing, and no fault was reported."""
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.tar").write_bytes(tar_bytes([("a.jpg", name.encode() * 9)]))
    run(tmp_path, input=(str(tmp_path / "x"), str(tmp_path / "y")))
    _change_in_place(tmp_path / "y/a.tar")
    (tmp_path / "x/a.tar").unlink()
    code, document = verified(tmp_path, capsys)
    faults = [finding["subject"] for finding in document["findings"] if finding["verdict"] == "fail"]
    assert (code, faults) == (1, ["y/a.tar"])


def _change_in_place(tar: Path) -> None:
    """Change a byte of an image but nothing that a listing shows, as after `rsync --times`."""
    times = tar.stat()
    content = bytearray(tar.read_bytes())
    content[513] ^= 1
    tar.write_bytes(content)
    os.utime(tar, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_an_output_is_verified_without_its_input(root, capsys, finished):
    moved = finished.with_name("moved")
    finished.rename(moved)
    try:
        code, document = verified(root, capsys)
    finally:
        moved.rename(finished)
    assert (code, [finding["verdict"] for finding in document["findings"]]) == (0, ["warn"])


def test_retried_rows_are_verified_like_others(tmp_path, capsys):
    finished_run(tmp_path)
    retry(tmp_path)
    assert verified(tmp_path, capsys)[0] == 0


def test_an_output_of_an_older_version_has_no_fault(tmp_path, capsys):
    """Its footers lack newer fields, and its pages have no checksums."""
    stored = Path(__file__).parents[2] / "fixtures/stored_run"
    assert verify(VerifySettings(output=str(stored / "finished"))) == 0
    assert "3 files of" in capsys.readouterr().out
    assert verify(VerifySettings(output=str(stored / "half_done"))) == 1
    assert "2 shards of 3 have no file: scenes-1.tar, scenes-2.tar" in capsys.readouterr().out


def test_a_folder_without_a_run_is_refused(tmp_path, capsys):
    assert verify(VerifySettings(output=str(tmp_path))) == 3
    assert "holds no run" in capsys.readouterr().err


def test_a_damaged_file_is_named_once_with_one_remedy(root, capsys):
    (root / "out" / TAR).write_bytes(b"PAR1 half of a file")
    (finding,) = verified(root, capsys)[1]["findings"]
    assert finding["found"].count("cannot be read") == 1 and TAR not in finding["found"]
    assert "delete" not in finding["found"]


@pytest.mark.parametrize("name", ["run.json", "shards.jsonl.gz"])
def test_a_damaged_record_is_refused_by_name(root, capsys, name):
    """A truncated record used to end in a traceback."""
    record = root / "out/_blip2" / name
    record.write_bytes(record.read_bytes()[:-20])
    assert status(StatusSettings(output=str(root / "out"))) == 3
    said = capsys.readouterr().err
    assert (
        f"the record of the run in {root / 'out'} is damaged: " in said and "restore _blip2/run.json" in said
    )
