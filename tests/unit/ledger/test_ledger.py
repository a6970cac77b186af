"""What a resume knows: a wrong plan reads finished shards again, or leaves rows out for good."""

import dataclasses

import pytest

from pipeline.inputs.reader import ShardReport
from pipeline.inputs.shards import Shard
from pipeline.ledger.fragments import write_fragment
from pipeline.ledger.ledger import Run, StoreShardReport, begin_run, load_run, scan_output, unfinished
from pipeline.settings.fingerprint import Fingerprint
from pipeline.settings.job_settings import CaptionSettings
from pipeline.storage.folder import Folder
from tests.unit.ledger.test_fragments import rows


@pytest.fixture
def folder(tmp_path) -> Folder:
    return Folder(str(tmp_path / "out"))


def shard(name: str) -> Shard:
    return Shard(name=name, format="webdataset", root="/in", files=(name,), size_bytes=7)


def make_run(*names: str) -> Run:
    settings = CaptionSettings(input=("/in",), output="/out").to_dict()
    return Run(Fingerprint({"prompt": None}), settings, tuple(shard(name) for name in names))


def test_a_run_is_read_back_as_it_was_begun(folder):
    assert load_run(folder) is None
    begin_run(folder, make_run("a.tar", "b/c.tar"))
    loaded = load_run(folder)
    assert loaded.shards == make_run("a.tar", "b/c.tar").shards
    assert loaded.fingerprint.differences(Fingerprint({"prompt": None})) == []


@pytest.mark.parametrize(
    ("root", "uri"),
    [
        ("s3://me:secret@bucket/in?region=here", "s3://me:secret@bucket/in/{0..9}.tar?region=here"),
        ("s3://bucket/in?access=secret", "s3://bucket/in?access=secret"),
        ("s3://bucket/in", "s3://bucket/in/a.tar"),
        ("/in", "/in/*.tar"),
    ],
)
def test_secrets_of_the_input_are_not_kept_and_come_back_with_it(folder, root, uri):
    begin_run(folder, Run(Fingerprint({}), {}, (dataclasses.replace(shard("a.tar"), root=root),)))
    assert "secret" not in load_run(folder).shards[0].root
    assert load_run(folder, ["s3://other:word@elsewhere/x", uri]).shards[0].root == root


def test_the_plan_leaves_out_what_is_finished_and_rows_that_reached_a_fragment(folder):
    run = make_run("done.tar", "begun.tar", "read.tar", "full.tar", "fresh.tar")
    folder.put("done.tar.parquet", b"")
    write_fragment(folder, rows([0, 1, 2], shard="begun.tar"))
    write_fragment(folder, rows([5, 6], shard="begun.tar"))
    for name in ("read.tar", "full.tar"):
        write_fragment(folder, rows([0, 1], shard=name))
    StoreShardReport(folder)(ShardReport(shard="read.tar", num_rows=4, complete=True))
    StoreShardReport(folder)(ShardReport(shard="full.tar", num_rows=2, complete=True))
    plan = {progress.shard.name: progress for progress in unfinished(folder, run, scan_output(folder))}
    assert {name: progress.work.missing for name, progress in plan.items()} == {
        "begun.tar": ((3, 5), (7, None)),
        "read.tar": ((2, 4),),
        "full.tar": (),
        "fresh.tar": ((0, None),),
    }
    assert [name for name, progress in plan.items() if progress.is_complete] == ["full.tar"]


def test_a_run_without_its_shard_list_has_not_begun(folder):
    """The list is written first; a driver that dies between the two begins anew."""
    begin_run(folder, make_run("a.tar"))
    folder.delete("_blip2/run.json")
    assert load_run(folder) is None
