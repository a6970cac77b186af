"""Which rows a retry runs: a missing one stays lost, and an extra one wastes an accelerator's time."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.cli.main import main
from pipeline.errors import RayStartFailed
from pipeline.inputs.reader import ShardReport
from pipeline.inputs.shards import Shard
from pipeline.ledger.commit import commit_shard
from pipeline.ledger.fragments import write_fragment
from pipeline.ledger.ledger import Ledger
from pipeline.ledger.retry import RowChoice, describe_work, read_keys
from pipeline.ledger.run_record import Run
from pipeline.progress import Console
from pipeline.run.run_job import run_job
from pipeline.schema import ROW_CONTRACT
from pipeline.settings.fingerprint import Fingerprint
from pipeline.settings.retry_settings import RetrySettings
from pipeline.storage.folder import Folder
from tests.unit.inputs.formats.reading_cases import tar_bytes
from tests.unit.inputs.run_without_ray import captions, prepare_of_retry, run, work

STATUSES = {
    "a.tar": ["ok", "failed", "ok", "undecodable", "failed"],
    "b.tar": ["ok", "too_large"],  # partial
    "c.tar": ["ok", "ok"],
}


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """A finished run. The key of each row is its number and the first letter of its shard."""
    folder = Folder(str(tmp_path / "out"))
    shards = tuple(Shard(name=n, format="webdataset", root="/in", files=(n,)) for n in STATUSES)
    ledger = Ledger(folder)
    ledger.begin(Run(Fingerprint({}), {}, shards))
    for shard, statuses in STATUSES.items():
        rows: list[dict[str, Any]] = [
            {"key": f"{shard[0]}{row}", "shard": shard, "row": row, "flags": [], "status": status}
            for row, status in enumerate(statuses)
        ]
        write_fragment(folder, pa.Table.from_pylist(rows, schema=ROW_CONTRACT))
        is_whole = shard != "b.tar"
        reason = None if is_whole else "ends early"
        report = ShardReport(shard=shard, num_rows=len(rows), complete=is_whole, reason=reason)
        commit_shard(folder, report, {})
    return ledger


A_AND_B = {"a.tar": ((1, 2), (3, 5)), "b.tar": ((1, None),)}


@pytest.mark.parametrize(
    ("statuses", "keys", "missing"),
    [
        ((), None, A_AND_B),
        (("failed",), None, {"a.tar": ((1, 2), (4, 5))}),
        (("undecodable", "too_large"), None, {"a.tar": ((3, 4),), "b.tar": ((1, None),)}),
        (("refused",), None, {}),
        ((), ("a0", "a1", "a3", "nobody"), {"a.tar": ((1, 2), (3, 4))}),
        ((), ("b1",), {"b.tar": ((1, None),)}),
        ((), ("c0",), {}),
        (("failed",), ("a3", "a4"), {"a.tar": ((4, 5),)}),
        (("ok",), ("a0", "a1", "c1"), {"a.tar": ((0, 1),), "c.tar": ((1, 2),)}),
    ],
)
def test_only_the_chosen_rows_are_run_again(ledger, statuses, keys, missing):
    choice = RowChoice(frozenset(statuses), None if keys is None else frozenset(keys))
    left = ledger.to_retry(ledger.require_run(), ledger.scan(), choice)
    assert {progress.shard.name: progress.work.missing for progress in left} == missing


def test_rows_that_a_stopped_retry_has_written_are_not_run_again(ledger):
    row = {"key": "a1", "shard": "a.tar", "row": 1, "flags": [], "status": "ok"}
    ledger.write_fragment(pa.Table.from_pylist([row], schema=ROW_CONTRACT))
    choice = RowChoice(frozenset({"failed"}))
    (left,) = ledger.to_retry(ledger.require_run(), ledger.scan(), choice)
    assert left.work.missing == ((4, 5),)


def test_it_says_how_many_rows_are_run_again(ledger):
    run, state = ledger.require_run(), ledger.scan()

    def said(choice: RowChoice) -> str:
        return describe_work(ledger.to_retry(run, state, choice), choice)

    assert said(RowChoice()) == "3 rows to run again in 2 shards, and what partial shards lack"
    assert said(RowChoice(frozenset({"failed"}))) == "2 rows to run again in 1 shard"
    assert said(RowChoice(keys=frozenset({"a1", "c0"}))) == "1 row to run again in 1 shard, of 2 keys"
    state = state.without(["b.tar", "c.tar"])  # as after --redo-changed
    assert said(RowChoice()) == "3 rows to run again in 1 shard; all rows of 2 shards to run again"
    state = state.without(["a.tar"])
    assert said(RowChoice()) == "all rows of 3 shards to run again"


def test_a_file_of_keys_has_one_a_line(tmp_path):
    file = tmp_path / "keys"
    file.write_text("a b\n\nc\u2028d\n", encoding="utf-8")
    assert read_keys(str(file)) == {"a b", "c\u2028d"}
    file.write_bytes(b"\xef\xbb\xbfa b\r\nc\r\n")  # as editors on Windows write it
    assert read_keys(file.as_uri()) == {"a b", "c"}
    for content, said in ((b"\n\n", "which has none"), (b"\xff", "must be a UTF-8 file")):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=said):
            read_keys(str(file))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--status", "fialed"], "--status must be one of ok, missing_image, "),
        (["--status", "ok"], "--status must not be ok without --keys"),
        (["--keys", "/nowhere"], "--keys must be a file that can be read, got /nowhere: No such file"),
    ],
)
def test_a_choice_that_cannot_be_meant_is_refused(tmp_path, flags, said, capsys):
    assert main(["retry", "--output", str(tmp_path), *flags]) == 3
    assert said in capsys.readouterr().err


def test_a_named_row_is_made_again_also_if_it_is_ok(tmp_path):
    (tmp_path / "in").mkdir()
    images = [(f"{name}.jpg", name.encode()) for name in ("a", "b", "bad")]
    (tmp_path / "in/0.tar").write_bytes(tar_bytes(images))
    run(tmp_path)
    path = tmp_path / "out/0.tar.parquet"
    table = pq.read_table(path).set_column(4, "caption", pa.array(["old", "old", None]))
    footer = {k: v for k, v in pq.read_metadata(path).metadata.items() if k != b"ARROW:schema"}
    pq.write_table(table.replace_schema_metadata(footer), path)
    (tmp_path / "keys").write_text("b\nbad\n")
    job = prepare_of_retry(tmp_path, keys=str(tmp_path / "keys"), status=("ok",))
    assert work(job).num_rows == 3
    assert captions(tmp_path)["0.tar"] == [("a", "old"), ("b", "b"), ("bad", None)]
    assert RetrySettings(output="o", status=("failed",)).status == ("failed",)


def test_rows_that_have_failed_again_in_a_killed_retry_go_again(tmp_path, monkeypatch):
    """All of them were in fragments, so nothing used to run after "1 row to run again"."""

    def connect(run_id=""):
        raise RayStartFailed("Ray is asked for")

    monkeypatch.setattr("pipeline.run.run_job.connected", connect)
    images = (("a.jpg", b"a"), ("b.jpg", b"bad"))
    (tmp_path / "in").mkdir()
    (tmp_path / "in/0.tar").write_bytes(tar_bytes(images))
    run(tmp_path)
    job = prepare_of_retry(tmp_path)
    again = {"key": "b", "shard": "0.tar", "row": 1, "flags": [], "status": "undecodable"}
    job.ledger.write_fragment(pa.Table.from_pylist([again], schema=ROW_CONTRACT))
    with pytest.raises(RayStartFailed):
        run_job(job, Console(io.StringIO()))
