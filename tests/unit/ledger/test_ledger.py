"""What a resume knows: a wrong list of work repeats finished shards, or leaves out rows for good."""

import dataclasses
import errno
import json
import os
import pickle

import pytest

from pipeline.inputs.reader import ShardReport
from pipeline.inputs.shards import Shard
from pipeline.ledger.commit import read_summary
from pipeline.ledger.layout import SHARD_LIST, slices_shard_list
from pipeline.ledger.ledger import Ledger
from pipeline.ledger.run_record import FORMAT_VERSION, Run
from pipeline.schema import RUN_ID_KEY
from pipeline.settings.fingerprint import Fingerprint
from pipeline.settings.job_settings import CaptionSettings
from pipeline.storage.folder import Folder
from tests.unit.ledger.test_fragments import rows

RUN_FILE = "_blip2/run.json"


@pytest.fixture
def ledger(tmp_path) -> Ledger:
    return Ledger(Folder(str(tmp_path / "out")))


def shard(name: str) -> Shard:
    return Shard(name=name, format="webdataset", root="/in", files=(name,), size_bytes=7)


def make_run(*names: str) -> Run:
    settings = CaptionSettings(input=("/in",), output="/out").to_dict()
    return Run(Fingerprint({"prompt": None}), settings, tuple(shard(name) for name in names))


def test_a_run_is_read_back_as_it_was_begun(ledger):
    assert ledger.load() is None
    ledger.begin(make_run("a.tar", "b/c.tar"))
    loaded = ledger.require_run()
    assert loaded.shards == make_run("a.tar", "b/c.tar").shards
    assert loaded.fingerprint.differences(Fingerprint({"prompt": None})) == []


def test_a_folder_without_a_run_is_refused_with_its_name(ledger):
    with pytest.raises(ValueError, match=f"^{ledger.folder.uri} holds no run; pass the folder given as --"):
        ledger.require_run()


def test_the_record_says_its_format_and_the_fingerprint_does_not(ledger):
    run = make_run("a.tar")
    ledger.begin(run)
    record = json.loads(ledger.folder.get(RUN_FILE) or b"")
    assert record["format_version"] == 1
    assert record["fingerprint"] == run.fingerprint.parts
    assert ledger.require_run().fingerprint.digest == run.fingerprint.digest


def test_a_record_with_another_list_of_shards_is_of_a_newer_format(ledger):
    """A reader of the previous version would find no list, and begin its own run over this one."""
    run = dataclasses.replace(make_run("a.tar"), shard_list=slices_shard_list("b"))
    ledger.begin(run)
    assert json.loads(ledger.folder.get(RUN_FILE) or b"")["format_version"] == FORMAT_VERSION == 2
    assert ledger.require_run().shards == run.shards


def test_a_record_without_a_format_version_is_read(ledger):
    """Runs that began before the version was stored must resume."""
    ledger.begin(make_run("a.tar"))
    record = json.loads(ledger.folder.get(RUN_FILE) or b"")
    del record["format_version"]
    ledger.folder.put(RUN_FILE, json.dumps(record).encode())
    assert ledger.require_run().shards == make_run("a.tar").shards


def test_a_record_of_a_newer_format_is_refused(ledger):
    """Its fields may have another meaning, and a resume would mix rows that do not belong together."""
    ledger.begin(make_run("a.tar"))
    record = json.loads(ledger.folder.get(RUN_FILE) or b"")
    ledger.folder.put(RUN_FILE, json.dumps(record | {"format_version": FORMAT_VERSION + 1}).encode())
    with pytest.raises(ValueError, match=r"newer version of this program .* format version 3, .* up to 2"):
        ledger.load()


@pytest.mark.parametrize(
    ("root", "uri"),
    [
        ("s3://me:secret@bucket/in?region=here", "s3://me:secret@bucket/in/{0..9}.tar?region=here"),
        ("s3://bucket/in?access=secret", "s3://bucket/in?access=secret"),
        ("s3://bucket/in", "s3://bucket/in/a.tar"),
        ("https://secret@web/in", "https://secret@web/in"),
        ("/in", "/in/*.tar"),
    ],
)
def test_secrets_of_the_input_are_not_stored_and_come_back_with_it(ledger, root, uri):
    ledger.begin(Run(Fingerprint({}), {}, (dataclasses.replace(shard("a.tar"), root=root),)))
    assert "secret" not in ledger.require_run().shards[0].root
    assert ledger.require_run(["s3://other:word@elsewhere/x", uri]).shards[0].root == root


def test_a_password_that_0_1_0_has_stored_in_the_name_of_a_model_is_left_out(ledger):
    """Such a name is now refused, and `retry` takes the model from the record."""
    stored = {
        "engine": {"model": "https://me:secret@web/a?token=secret", "adapter": None},
        "prompt": "u://a:b@c",
    }
    ledger.begin(Run(Fingerprint({}), stored, (shard("a.tar"),)))
    read = ledger.require_run().settings
    assert read == {"engine": {"model": "https://web/a", "adapter": None}, "prompt": "u://a:b@c"}


def test_unfinished_work_leaves_out_finished_shards_and_rows_in_fragments(ledger):
    run = make_run("done.tar", "begun.tar", "read.tar", "full.tar", "fresh.tar")
    ledger.folder.put("done.tar.parquet", b"")
    ledger.write_fragment(rows([0, 1, 2], shard="begun.tar"))
    ledger.write_fragment(rows([5, 6], shard="begun.tar"))
    for name in ("read.tar", "full.tar"):
        ledger.write_fragment(rows([0, 1], shard=name))
    ledger.store_shard_report(ShardReport(shard="read.tar", num_rows=4, complete=True))
    ledger.store_shard_report(ShardReport(shard="full.tar", num_rows=2, complete=True))
    found = {progress.shard.name: progress for progress in ledger.unfinished(run, ledger.scan())}
    assert {name: progress.work.missing for name, progress in found.items()} == {
        "begun.tar": ((3, 5), (7, None)),
        "read.tar": ((2, 4),),
        "full.tar": (),
        "fresh.tar": ((0, None),),
    }
    assert [name for name, progress in found.items() if progress.is_complete] == ["full.tar"]


def test_an_empty_list_of_shards_is_damage(ledger):
    """The run used to count as finished, with no row and status 0, and `clean` deleted its fragments."""
    ledger.begin(make_run("a.tar"))
    ledger.folder.put(SHARD_LIST, b"")
    with pytest.raises(
        ValueError, match=r"the record of the run in .* is damaged: the list of shards is empty"
    ):
        ledger.load()


def test_a_run_with_a_shard_list_alone_has_not_begun(ledger):
    """The list is written first; if a driver dies between the two files, the next one begins the run."""
    ledger.begin(make_run("a.tar"))
    ledger.folder.delete(RUN_FILE)
    assert ledger.load() is None


def test_a_worker_has_the_same_folder_and_the_same_retries(tmp_path, monkeypatch):
    """Workers have another working directory, and must survive a store that fails."""
    monkeypatch.chdir(tmp_path)
    sent = pickle.dumps(Ledger(Folder("out")).with_retries(7.0).store_shard_report)
    monkeypatch.chdir("/")
    pickle.loads(sent)(ShardReport(shard="a.tar", num_rows=1, complete=True))
    assert (tmp_path / "out" / "_blip2" / "fragments" / "a.tar.rows" / "report.json").exists()
    assert pickle.loads(sent).__self__.folder.retry_for_s == 7.0


def test_a_damaged_file_is_named(ledger):
    """Arrow says that a footer is damaged, but not in which file."""
    ledger.begin(make_run("a.tar", "b.tar"))
    ledger.folder.put("b.tar.parquet", b"PAR1 half of a file")
    with pytest.raises(ValueError, match=r"b\.tar\.parquet in .* cannot be read: [^;]*$"):
        read_summary(ledger.folder, "b.tar")
    with pytest.raises(ValueError, match=r"b\.tar\.parquet in"):
        ledger.commit(ShardReport(shard="b.tar", num_rows=0, complete=True), {})


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError("Couldn't deserialize thrift"), r"^a in .* cannot be read: Couldn't deserialize thrift$"),
        (OSError(errno.EIO, "Input/output error"), r"^\[Errno 5\] Input/output error$"),
        (PermissionError("403"), "^403$"),
    ],
)
def test_a_file_with_a_damaged_page_is_named_and_the_type_stays(ledger, error, said):
    ledger.folder.put("a", b"1")
    with pytest.raises(type(error), match=said), ledger.folder.open("a"):
        raise error


def test_a_name_that_is_not_utf_8_does_not_hide_the_others(ledger):
    """Arrow cannot list a folder with such a file, so no command could use the output."""
    ledger.begin(make_run("a.tar"))
    for name in ("a.tar.parquet", "\udcff.txt", "b/\udcff.parquet", "_blip2/tmp/\udcff"):
        ledger.folder.put(name, b"12")
    state = ledger.scan()
    assert (set(state.finished), state.leftovers) == ({"a.tar", "b/\udcff"}, ("_blip2/tmp/\udcff",))
    assert state.written["a.tar"] == ledger.folder.file("a.tar.parquet")
    ledger.sweep(make_run(), state, {})
    assert "_blip2/tmp/\udcff" not in ledger.folder.names()


@pytest.mark.parametrize("is_slice", [False, True])
def test_a_start_deletes_late_fragments_of_shards_that_the_run_no_longer_has(ledger, is_slice):
    """`verify` used to say that the next start deletes them. A driver of a slice may not know all shards."""
    ledger.begin(make_run("a.tar"))
    fragment = ledger.write_fragment(rows([0], shard="table.parquet~0-9"))
    late = ShardReport(shard="table.parquet~0-9", num_rows=1, complete=True)
    ledger.store_shard_report(late)
    state = ledger.sweep(make_run("a.tar"), ledger.scan(), {}, is_slice=is_slice)
    assert (fragment.name in ledger.folder.names()) == bool(state.fragments) == is_slice
    assert bool(ledger.scan().shard_reports) == bool(state.shard_reports) == is_slice


def test_a_start_deletes_late_files_of_shards_that_the_run_no_longer_has(ledger):
    """Programs that read the folder used to read their rows with those of the table's new parts."""
    run = dataclasses.replace(make_run("a.tar"), id="run")
    ledger.begin(run)

    def commit(name: str, run_id: str) -> None:
        ledger.write_fragment(rows([0], shard=name))
        ledger.commit(ShardReport(shard=name, num_rows=1, complete=True), {RUN_ID_KEY: run_id.encode()})

    for name, run_id in (("a.tar", run.id), ("table.parquet~0-9", run.id), ("foreign.tar", "another")):
        commit(name, run_id)
    ledger.folder.put("copy.parquet", ledger.folder.get("a.tar.parquet") or b"")
    ledger.folder.put("damaged.parquet", b"PAR1")
    all_files = {"a.tar", "table.parquet~0-9", "foreign.tar", "copy", "damaged"}
    assert ledger.sweep(run, ledger.scan(), {}, is_slice=True).finished == all_files
    kept = all_files - {"table.parquet~0-9"}
    assert ledger.sweep(run, ledger.scan(), {}).finished == kept == ledger.scan().finished


def test_a_folder_is_listed_with_links_and_without_what_is_no_file(ledger, tmp_path):
    elsewhere, out = tmp_path / "elsewhere", tmp_path / "out"
    elsewhere.mkdir()
    out.mkdir()
    (elsewhere / "a.tar.parquet").write_bytes(b"12")
    (out / "link").symlink_to(elsewhere)
    (out / "broken").symlink_to("nothing")
    (out / "itself").symlink_to("itself")
    os.mkfifo(out / "pipe")
    assert ledger.folder.names() == ["link/a.tar.parquet"]
    assert ledger.folder.names("nothing") == []
