"""Resume and retry use the input of the run: no output is half old and half new."""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import InputError, OutputInUse
from pipeline.inputs import changes, listing
from pipeline.inputs.reader import ReadOptions, ShardReport
from pipeline.inputs.shards import Shard
from pipeline.ledger.ledger import Ledger
from pipeline.ledger.run_record import read_run
from pipeline.progress import Console
from pipeline.report.status import RunStatus
from pipeline.run.run_job import run_job
from pipeline.settings.fingerprint import FingerprintMismatch
from pipeline.storage import file_table, packed_texts
from pipeline.storage.file_table import FileTable, ListedFile
from pipeline.storage.folder import Folder, WrittenFile
from tests.unit.inputs.formats.reading_cases import tar_bytes
from tests.unit.inputs.run_without_ray import captions, prepare_of_retry, prepare_run, retry, run, work
from tests.unit.ledger.test_fragments import rows as fragment_rows

TAKE_IT = "run the first command again with --add-new to take it into the run"


def write_tar(path: Path, *keys: str, content: str = "old", bad: tuple[str, ...] = ()) -> None:
    """Write a tar with the given samples; each image tells its sample."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = {key: f"{'bad' if key in bad else content} {key}".encode() for key in keys}
    path.write_bytes(tar_bytes((f"{key}.jpg", image) for key, image in images.items()))


def write_images(folder: Path, *names: str, content: str = "old") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text(f"{content} {name}")


def age(path: Path) -> None:
    """Make a file look as if it had been written an hour later, because clocks may be coarse."""
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 3600 * 10**9))


def rows_of(*keys: str, content: str = "old") -> list[tuple[str, str | None]]:
    return [(key, f"{content} {key}") for key in keys]


# A shard that has changed --------------------------------------------------------------------------------


def test_a_tar_made_again_with_one_more_sample_is_refused_and_made_again_whole(tmp_path):
    """`retry` used to join rows by number: a key came twice and two samples were lost, with exit status 0."""
    write_tar(tmp_path / "in/0.tar", "a", "b", "c", bad=("b",))
    write_tar(tmp_path / "in/1.tar", "x")
    run(tmp_path)
    untouched = (tmp_path / "out/1.tar.parquet").read_bytes()
    write_tar(tmp_path / "in/0.tar", "new", *"abcdefghij", content="new")
    for again in (run, retry):
        with pytest.raises(
            InputError, match=r"1 shard .* changed .*: 0.tar \(20,480 bytes, 10,240 before\); add --redo-"
        ):
            again(tmp_path)
    assert captions(tmp_path)["0.tar"][0] == ("a", "old a"), "a refused run changes nothing"
    assert retry(tmp_path, redo_changed=True).num_failed == 0
    assert captions(tmp_path)["0.tar"] == rows_of("new", *"abcdefghij", content="new")
    assert (tmp_path / "out/1.tar.parquet").read_bytes() == untouched
    assert run(tmp_path).exit_status(0.0) == 0, "the run knows the new tar from now on"


def test_a_resume_never_joins_fragments_of_another_tar(tmp_path):
    """A shorter tar in its place used to lose 22 keys and keep rows of removed samples, with status 0."""
    keys = [f"k{at}" for at in range(11)]
    write_tar(tmp_path / "in/0.tar", *keys)
    run(tmp_path, max_tables=1, reading=ReadOptions(table_rows=4))
    assert Ledger(Folder(str(tmp_path / "out"))).scan().fragments["0.tar"][0].count == 4
    write_tar(tmp_path / "in/0.tar", *keys[::2], content="new")
    with pytest.raises(InputError, match="--redo-changed"):
        run(tmp_path)
    run(tmp_path, redo_changed=True)
    assert captions(tmp_path)["0.tar"] == rows_of(*keys[::2], content="new")


def test_fragments_that_arrive_late_do_not_join_a_shard_that_was_begun_again(tmp_path):
    """A worker may write after its driver has died, even when the shard has been restarted meanwhile."""
    write_tar(tmp_path / "in/0.tar", "k0", "k1")
    straggler = prepare_run(tmp_path)
    straggler.ledger.begin(straggler.run)
    write_tar(tmp_path / "in/0.tar", "k0", "k1", "k2", content="new")
    job = prepare_run(tmp_path, redo_changed=True)
    late = fragment_rows([0, 1], shard="0.tar", word="late")

    def write_late() -> None:
        straggler.ledger.write_fragment(late)
        straggler.ledger.store_shard_report(ShardReport(shard="0.tar", num_rows=2, complete=True))

    work(job, after_table=write_late)
    assert captions(tmp_path)["0.tar"] == rows_of("k0", "k1", "k2", content="new")
    run(tmp_path)
    assert [name for name in Folder(str(tmp_path / "out")).names() if "late" in name or ".rows" in name] == []


@pytest.mark.parametrize("moment", ["before work", "at work, and the driver dies", "after the commit"])
def test_a_late_commit_does_not_mix_into_a_shard_that_was_begun_again(tmp_path, moment):
    """A driver that had been suspended used to commit rows of the old tar into the file of the new one."""
    write_tar(tmp_path / "in/0.tar", "k0", "k1", "k2")
    straggler = prepare_run(tmp_path)
    straggler.ledger.begin(straggler.run)
    write_tar(tmp_path / "in/0.tar", "k0", "k1", content="new")
    job = prepare_run(tmp_path, redo_changed=True)

    def commit_late() -> None:
        straggler.ledger.write_fragment(fragment_rows([0, 1, 2], shard="0.tar", word="late"))
        straggler.ledger.commit(ShardReport(shard="0.tar", num_rows=3, complete=True), {})

    if moment == "before work":
        job.ledger.revise(job.run, job.redone)
        commit_late()
    elif moment == "after the commit":
        work(job)
        commit_late()
    else:
        work(job, max_tables=1, after_table=commit_late)
    job = prepare_run(tmp_path)
    assert work(job).exit_status(0.0) == 0
    assert captions(tmp_path)["0.tar"] == rows_of("k0", "k1", content="new")
    assert job.ledger.scan().fragments == {}


@pytest.mark.parametrize("how", ["replaced", "written over"])
def test_a_tar_that_changes_while_it_is_read_gives_no_row(tmp_path, how):
    """Its rows may come from both files. The shard is marked partial, and `retry` reads the new file."""
    keys = [f"k{at}" for at in range(10)]
    tar = tmp_path / "in/0.tar"
    write_tar(tar, *keys)
    job = prepare_run(tmp_path, reading=ReadOptions(table_rows=4))

    def change() -> None:
        if how == "replaced":
            tar.unlink()
        write_tar(tar, *keys[2:], content="new")

    result = work(job, after_table=change)
    (partial,) = result.partial
    assert "0.tar has changed while it was read; --redo-changed makes its rows again" in (
        partial.reason or ""
    )
    assert captions(tmp_path) == {"0.tar": []}
    with pytest.raises(InputError, match="1 shard of the input has changed"):
        run(tmp_path)
    assert retry(tmp_path).partial == []
    assert captions(tmp_path)["0.tar"] == rows_of(*keys[2:], content="new")


def test_a_tar_that_changed_between_listing_and_reading_is_not_read(tmp_path):
    write_tar(tmp_path / "in/0.tar", "a")
    job = prepare_run(tmp_path)
    write_tar(tmp_path / "in/0.tar", "a", "b", "c")
    (partial,) = work(job).partial
    assert "has changed since the run has listed it" in (partial.reason or "")


def test_a_tar_that_changes_during_a_resume_loses_the_report_of_its_first_reading(tmp_path):
    """The driver used to know the number of rows from the first reading, and to commit rows of both files."""
    write_tar(tmp_path / "in/0.tar", "a", "b", "c", bad=("b",))
    run(tmp_path)
    job = prepare_run(tmp_path)
    write_tar(tmp_path / "in/0.tar", "new", "a", "b", "c", content="new")
    state = job.ledger.scan()
    changed = ShardReport(shard="0.tar", num_rows=0, complete=False, changed=True, reason="has changed")
    job.ledger.store_shard_report(changed)
    job.ledger.write_fragment(fragment_rows([1], shard="0.tar"))
    summary = job.ledger.commit(ShardReport(shard="0.tar", num_rows=3, complete=True), {})
    assert state.finished == {"0.tar"} and summary is not None
    assert (summary.num_rows, summary.complete, summary.reason) == (3, False, "has changed")
    assert captions(tmp_path)["0.tar"] == [("a", "old a"), ("b", None), ("c", "old c")]


def test_a_copy_with_another_time_is_the_same_input(tmp_path):
    write_tar(tmp_path / "in/0.tar", "a", "b")
    run(tmp_path)
    age(tmp_path / "in/0.tar")
    assert run(tmp_path).exit_status(0.0) == 0
    stored = read_run(Folder(str(tmp_path / "out")))
    assert stored is not None
    assert stored.shards[0].stamps[0].endswith(str((tmp_path / "in/0.tar").stat().st_mtime_ns))


def test_a_finished_run_whose_input_was_copied_starts_no_ray(tmp_path, monkeypatch):
    """Its record gets the new times; on a cluster, the run used to wait for a node that could read first."""
    monkeypatch.setattr("pipeline.run.run_job.connected", lambda: pytest.fail("Ray is not needed"))
    write_tar(tmp_path / "in/0.tar", "a", "b")
    run(tmp_path)
    age(tmp_path / "in/0.tar")
    job = prepare_run(tmp_path)
    assert job.is_revised and run_job(job, Console(io.StringIO())).exit_status(0.0) == 0
    assert not prepare_run(tmp_path).is_revised


def test_a_start_lists_the_output_once_and_writes_the_file_of_a_changed_shard_once(tmp_path, monkeypatch):
    """In a store, three listings used to take half a minute, and each start wrote the file again."""
    write_tar(tmp_path / "in/0.tar", "a", "b")
    job = prepare_run(tmp_path)
    write_tar(tmp_path / "in/0.tar", "a", "b", "c")
    (partial,) = work(job).partial
    written = (tmp_path / "out/0.tar.parquet").stat().st_mtime_ns
    listed: list[str] = []
    original = Folder._list_once

    def list_once(folder: Folder, under: str) -> list[WrittenFile]:
        listed.append(under)
        return original(folder, under)

    monkeypatch.setattr(Folder, "_list_once", list_once)
    monkeypatch.setattr("pipeline.run.run_job.connected", lambda: pytest.fail("Ray is not needed"))
    job = dataclasses.replace(job, is_new=False)
    assert run_job(job, Console(io.StringIO())).partial == [partial]
    assert listed.count("") == 1
    assert (tmp_path / "out/0.tar.parquet").stat().st_mtime_ns == written


def test_other_bytes_of_the_same_size_are_another_input(tmp_path):
    write_tar(tmp_path / "in/0.tar", "a", "b")
    run(tmp_path)
    write_tar(tmp_path / "in/0.tar", "a", "b", content="new")
    age(tmp_path / "in/0.tar")
    with pytest.raises(InputError, match=r"0.tar \(same size, another modification time\)"):
        run(tmp_path)


def test_a_partial_tar_that_was_repaired_is_made_again_by_retry_alone(tmp_path):
    write_tar(tmp_path / "in/0.tar", *"abcdef")
    whole = (tmp_path / "in/0.tar").read_bytes()
    (tmp_path / "in/0.tar").write_bytes(whole[: len(whole) // 2])
    assert len(run(tmp_path).partial) == 1
    (tmp_path / "in/0.tar").write_bytes(whole)
    assert retry(tmp_path).partial == []
    assert captions(tmp_path)["0.tar"] == rows_of(*"abcdef")


def test_a_tar_that_changes_again_while_it_is_made_again_is_read_anew_by_retry(tmp_path):
    """The shard then has no file, and no row of its earlier content."""
    write_tar(tmp_path / "in/0.tar", *"abc", bad=("b",))
    run(tmp_path)
    write_tar(tmp_path / "in/0.tar", *"abcd", content="new")
    work(prepare_of_retry(tmp_path, redo_changed=True), max_tables=0)
    write_tar(tmp_path / "in/0.tar", *"abcde", content="newest")
    retry(tmp_path)
    assert captions(tmp_path)["0.tar"] == rows_of(*"abcde", content="newest")


@pytest.mark.parametrize(
    ("limit", "before", "num_rows", "after"),
    [
        (None, {"0-1": "01", "2-3": "23", "4-5": "45"}, 3, {"0-1": "01", "2-2": "2"}),
        (5, {"0-1": "01", "2-3": "23", "4-5": "4"}, 8, {"0-1": "01", "2-3": "23", "4-5": "4"}),
    ],
)
def test_all_ranges_of_a_changed_table_are_made_again(tmp_path, monkeypatch, limit, before, num_rows, after):
    """Its row groups move: a range of the new table differs from that of the old one."""
    monkeypatch.setattr(listing, "RANGE_BYTES", 1)

    def write_table(num_rows: int, content: str) -> None:
        (tmp_path / "in").mkdir(exist_ok=True)
        keys = [f"{at}" for at in range(num_rows)]
        images = [f"{content} {key}".encode() for key in keys]
        pq.write_table(pa.table({"key": keys, "image": images}), tmp_path / "in/t.parquet", row_group_size=2)

    def expected(ranges: dict[str, str], content: str) -> dict[str, Any]:
        return {f"t.parquet~{name}": rows_of(*keys, content=content) for name, keys in ranges.items()}

    write_table(6, "old")
    run(tmp_path, limit=limit)
    assert captions(tmp_path) == expected(before, "old")
    write_table(num_rows, "new")
    with pytest.raises(InputError, match="3 shards of the input have changed"):
        run(tmp_path, limit=limit)
    run(tmp_path, limit=limit, redo_changed=True)
    assert captions(tmp_path) == expected(after, "new")


def test_rows_with_other_keys_are_not_merged_when_the_listing_knew_nothing(tmp_path):
    """Runs of version 0.1.0 have no stamps, so the keys are all that shows a change."""
    write_tar(tmp_path / "in/0.tar", "a", "b", "c", bad=("b",))
    run(tmp_path)
    forget_stamps(tmp_path)
    write_tar(tmp_path / "in/0.tar", "new", "a", "b", "c")
    (partial,) = retry(tmp_path).partial
    assert "row 1 was read as a and as b; --redo-changed makes" in (partial.reason or "")
    assert captions(tmp_path)["0.tar"] == [("a", "old a"), ("b", None), ("c", "old c")]
    with pytest.raises(InputError, match="1 shard of the input has changed"):
        run(tmp_path)
    run(tmp_path, redo_changed=True)
    assert captions(tmp_path)["0.tar"] == rows_of("new", "a", "b", "c")


def test_a_run_without_stamps_gets_them_at_its_next_start(tmp_path):
    write_tar(tmp_path / "in/0.tar", "a", "b")
    run(tmp_path)
    forget_stamps(tmp_path)
    assert run(tmp_path).exit_status(0.0) == 0
    write_tar(tmp_path / "in/0.tar", "a", "b", "c")
    with pytest.raises(InputError, match="--redo-changed"):
        run(tmp_path)


def forget_stamps(root: Path) -> None:
    """Store a run as version 0.1.0 did."""
    path = root / "out/_blip2/shards.jsonl.gz"
    shards = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    old = [
        {name: value for name, value in each.items() if name not in ("stamps", "generation")}
        for each in shards
    ]
    path.write_bytes(gzip.compress("".join(json.dumps(each) + "\n" for each in old).encode()))
    record = json.loads((root / "out/_blip2/run.json").read_text())
    del record["working_folder"], record["hides_options"]
    (root / "out/_blip2/run.json").write_text(json.dumps(record))


# Files that are new or gone ------------------------------------------------------------------------------


def test_a_new_photo_is_named_and_becomes_a_shard_of_its_own(tmp_path):
    """The next day the folder used to say "0 to do", and the new photo was in no output."""
    write_images(tmp_path / "in", *(f"{at}.jpg" for at in range(1, 12)))
    run(tmp_path)
    (old,) = captions(tmp_path)
    before = (tmp_path / f"out/{old}.parquet").read_bytes()
    begun = (tmp_path / "out/_blip2/run.json").stat().st_mtime_ns
    write_images(tmp_path / "in", "0.jpg")
    job = prepare_run(tmp_path)
    assert job.notes == (f"1 new file: 0.jpg; {TAKE_IT}",)
    assert job.notes[0] in RunStatus.read(str(tmp_path / "out")).lines()
    assert run(tmp_path).num_rows == 11
    assert prepare_run(tmp_path, add_new=True).notes == ("1 new file: 0.jpg; added to the run",)
    assert run(tmp_path, add_new=True).num_rows == 12
    assert (tmp_path / f"out/{old}.parquet").read_bytes() == before
    assert (tmp_path / "out/_blip2/run.json").stat().st_mtime_ns == begun, "the report tells when it began"
    assert captions(tmp_path)["in~11-11"] == [("0.jpg", "old 0.jpg")]
    assert run(tmp_path, add_new=True).num_rows == 12 and prepare_run(tmp_path).notes == ()


def test_a_photo_that_is_gone_from_a_slice_that_is_made_again_is_told(tmp_path):
    """The note used to say that finished rows stay, but this photo's caption did not."""
    write_images(tmp_path / "in", "0.jpg", "1.jpg")
    run(tmp_path)
    write_images(tmp_path / "in", "0.jpg", content="newer")
    (tmp_path / "in/1.jpg").unlink()
    _, gone = prepare_run(tmp_path, redo_changed=True).notes
    assert gone.endswith(": 1.jpg; finished rows stay, except in shards whose rows are made again")


def test_new_tars_are_added_under_the_names_that_a_listing_gives_them(tmp_path):
    write_tar(tmp_path / "in/a/0.tar", "a0")
    run(tmp_path)
    write_tar(tmp_path / "in/a/1.tar", "a1")
    write_tar(tmp_path / "in/b/0.tar", "b0")
    assert prepare_run(tmp_path).notes == (
        "2 new files: a/1.tar, b/0.tar; run the first command again with --add-new to take them into the run",
    )
    run(tmp_path, add_new=True)
    assert list(captions(tmp_path)) == ["a/0.tar", "a/1.tar", "b/0.tar"]


def test_the_shards_of_a_run_stay_sorted_when_new_ones_are_added(tmp_path):
    """`blip2 show` used to list the new rows last, but elsewhere after the next start."""
    write_tar(tmp_path / "in/1.tar", "b")
    run(tmp_path)
    write_tar(tmp_path / "in/0.tar", "a")
    run(tmp_path, add_new=True)
    begun = read_run(Folder(str(tmp_path / "out")))
    assert begun is not None and [shard.name for shard in begun.shards] == ["0.tar", "1.tar"]
    assert not prepare_run(tmp_path).is_revised


def test_new_tars_of_a_folder_keep_its_prefix_when_another_folder_is_added(tmp_path):
    """Names are relative to the folder that all inputs share, which another input moves up."""
    first, second = str(tmp_path / "in/a"), str(tmp_path / "in/b")
    write_tar(tmp_path / "in/a/0.tar", "a0")
    run(tmp_path, input=(first,))
    write_tar(tmp_path / "in/a/1.tar", "a1")
    write_tar(tmp_path / "in/b/0.tar", "b0")
    run(tmp_path, input=(first, second), add_new=True)
    assert list(captions(tmp_path)) == ["0.tar", "1.tar", "b/0.tar"]


def test_a_new_file_whose_name_leaves_no_room_for_those_of_the_output_is_refused(tmp_path):
    """The job used to write the other rows, and then fail at the first fragment of this file."""
    write_tar(tmp_path / "in/0.tar", "a")
    run(tmp_path)
    write_tar(tmp_path / f"in/{'n' * 250}.tar", "b")
    with pytest.raises(ValueError, match="room for the names of its files, got a name of"):
        prepare_run(tmp_path, add_new=True)
    assert prepare_run(tmp_path).run.shards


def test_files_that_are_gone_are_named_and_their_rows_stay(tmp_path):
    write_tar(tmp_path / "in/0.tar", "a")
    write_tar(tmp_path / "in/1.tar", "b")
    run(tmp_path)
    (tmp_path / "in/0.tar").unlink()
    (note,) = prepare_run(tmp_path).notes
    assert note == "1 file of the run can no longer be found in the input: 0.tar; finished rows stay"
    assert note in RunStatus.read(str(tmp_path / "out")).lines()
    assert run(tmp_path).exit_status(0.0) == 0
    shutil.rmtree(tmp_path / "in")
    cannot = "the input cannot be compared with that of the run: no such"
    assert prepare_run(tmp_path).notes[0].startswith(cannot)
    for flag in ("add_new", "redo_changed"):
        with pytest.raises(InputError, match=f"{cannot} .* leave out --{flag.replace('_', '-')}"):
            prepare_run(tmp_path, **{flag: True})


@pytest.mark.parametrize("left", ["nothing", "an empty folder", "another file"])
def test_an_input_whose_files_are_all_gone_does_not_hide_what_became_of_the_others(tmp_path, left):
    """An emptied folder used to make changed shards count as finished and hide new files, with status 0."""
    inputs = (str(tmp_path / "a"), str(tmp_path / "b/{0,1}.tar"), f"@{tmp_path / 'c.txt'}")
    for name in ("a/0.tar", "b/0.tar", "b/1.tar", "c/0.tar", "c/1.tar"):
        write_tar(tmp_path / name, "k")
    (tmp_path / "c.txt").write_text("c/0.tar\nc/1.tar\n")
    run(tmp_path, input=inputs)
    for name in ("a/0.tar", "b/0.tar", "c/0.tar"):
        (tmp_path / name).unlink()
    if left == "nothing":
        (tmp_path / "a").rmdir()
    elif left == "another file":
        (tmp_path / "a/readme.md").touch()
    write_tar(tmp_path / "b/1.tar", "k", "more", content="new")
    with pytest.raises(InputError, match=r"1 shard of the input has changed .*: b/1.tar"):
        run(tmp_path, input=inputs)
    write_tar(tmp_path / "d/0.tar", "d")
    more = (*inputs, str(tmp_path / "d"))
    done = run(tmp_path, input=more, add_new=True, redo_changed=True)
    assert done.num_rows == 7 and captions(tmp_path)["b/1.tar"] == rows_of("k", "more", content="new")
    names = ", ".join(str(tmp_path / name) for name in ("a/0.tar", "b/0.tar", "c/0.tar"))
    gone = f"3 files of the run can no longer be found in the input: {names}; finished rows stay"
    assert gone in prepare_run(tmp_path, input=more).notes
    with pytest.raises(InputError, match="no such file or folder: typo"):
        run(tmp_path, input=(*more, "typo"), add_new=True)


def test_a_job_that_another_one_has_overtaken_is_refused(tmp_path):
    """Both used to take new files into the run: an image was in two shards' files, and one was in no list."""
    write_images(tmp_path / "in", "0.jpg", "1.jpg")
    run(tmp_path)
    write_images(tmp_path / "in", "2.jpg")
    slow = [prepare_run(tmp_path, add_new=True), prepare_run(tmp_path), prepare_of_retry(tmp_path)]
    write_images(tmp_path / "in", "3.jpg")
    assert run(tmp_path, add_new=True).num_rows == 4
    for job in slow:
        with pytest.raises(OutputInUse, match="whose run has other shards since; run the same command again"):
            work(job)
    assert run(tmp_path, add_new=True).num_rows == 4
    assert [key for rows in captions(tmp_path).values() for key, _ in rows] == [f"{n}.jpg" for n in range(4)]


def test_a_photo_that_was_edited_is_a_change_unless_the_folder_is_very_large(tmp_path, monkeypatch):
    write_images(tmp_path / "in", "0.jpg", "1.jpg")
    run(tmp_path)
    write_images(tmp_path / "in", "1.jpg", content="edited")
    with pytest.raises(InputError, match=r"in~0-1 \(1.jpg: 12 bytes, 9 before\)"):
        run(tmp_path)
    run(tmp_path, redo_changed=True)
    assert captions(tmp_path)["in~0-1"] == [("0.jpg", "old 0.jpg"), ("1.jpg", "edited 1.jpg")]
    for module in (changes, listing):
        monkeypatch.setattr(module, "MAX_STAMPED_IMAGES", 1)
    run(tmp_path, output=str(tmp_path / "large"))
    write_images(tmp_path / "in", "1.jpg", content="edited again")
    assert run(tmp_path, output=str(tmp_path / "large")).exit_status(0.0) == 0


def test_a_limit_has_no_new_files_and_add_new_is_refused_with_it(tmp_path):
    write_tar(tmp_path / "in/0.tar", "a", "b", "c")
    write_tar(tmp_path / "in/1.tar", "d")
    run(tmp_path, limit=2)
    assert prepare_run(tmp_path, limit=2).notes == ()
    write_tar(tmp_path / "in/0.tar", "x", "y", "z", content="new")
    run(tmp_path, limit=2, redo_changed=True)
    assert captions(tmp_path) == {"0.tar": rows_of("x", "y", content="new")}
    with pytest.raises(ValueError, match="add_new must be left out with limit"):
        prepare_run(tmp_path, limit=2, add_new=True)


def test_the_job_says_what_is_new_at_its_start(tmp_path):
    write_tar(tmp_path / "in/0.tar", "a")
    run(tmp_path)
    write_tar(tmp_path / "in/1.tar", "b")
    said = io.StringIO()
    run_job(prepare_run(tmp_path), Console(said))
    assert f"1 new file: 1.tar; {TAKE_IT}" in said.getvalue()


# The same input in other words ---------------------------------------------------------------------------


def test_order_spelling_and_a_last_slash_of_inputs_do_not_matter(tmp_path, monkeypatch):
    for name in ("a", "b"):
        write_tar(tmp_path / f"in/{name}.tar", name)
    monkeypatch.chdir(tmp_path)
    run(tmp_path, input=("in/a.tar", f"{tmp_path}/in/b.tar"))
    same = [("in/b.tar", "./in/a.tar"), (f"file://{tmp_path}/in/a.tar", f"{tmp_path}/in/../in/b.tar")]
    for inputs in same:
        assert run(tmp_path, input=inputs).num_rows == 2
    monkeypatch.chdir(tmp_path / "in")
    assert run(tmp_path, input=("a.tar", "b.tar")).num_rows == 2
    assert retry(tmp_path).num_rows == 2
    run(tmp_path, input=(str(tmp_path / "in"),), output=str(tmp_path / "folder"))
    assert run(tmp_path, input=(f"{tmp_path}/in/",), output=str(tmp_path / "folder")).num_rows == 2


def test_an_input_added_by_a_glob_of_the_shell_is_named_alone(tmp_path):
    """The refusal used to print all 1,000 names twice."""
    tars = [tmp_path / f"in/{at:03}.tar" for at in range(40)]
    for tar in tars:
        write_tar(tar, tar.stem)
    names = tuple(map(str, tars))
    run(tmp_path, input=names[:12])
    with pytest.raises(FingerprintMismatch) as refusal:
        run(tmp_path, input=names)
    message = str(refusal.value)
    assert f"added {names[12]}, " in message and "and 18 more; run the first" in message
    assert message.count(".tar") == 10 and "--add-new" in message
    assert run(tmp_path, input=names[:13], add_new=True).num_rows == 13
    assert run(tmp_path, input=names[:13]).num_rows == retry(tmp_path).num_rows == 13
    with pytest.raises(FingerprintMismatch, match=r"left out .*000\.tar; run"):
        run(tmp_path, input=names[1:13], add_new=True)


def test_comparing_many_files_unpacks_their_names_once(monkeypatch):
    """Looking files up in the order of a set cost six seconds more per command for 100,000 tars."""
    monkeypatch.setattr(file_table, "BLOCK_FILES", 10)
    num_files = 400
    files = FileTable((f"{n:03}.tar", ListedFile(1, "1@5")) for n in range(num_files))
    listed = dataclasses.replace(changes.NO_FILES, chosen={("s3://bucket", "webdataset"): files})
    shards = [
        Shard(name=file, format="webdataset", root="s3://bucket", files=(file,), stamps=("1@5",))
        for file in files
    ]
    unpacked = packed_texts._unpack.cache_info().misses
    found = changes.find_changes(shards, listed, lambda shard: None)
    assert (found.changed, found.gone, found.num_new) == ({}, (), 0)
    num_blocks = num_files // 10
    assert packed_texts._unpack.cache_info().misses - unpacked <= 2 * num_blocks  # names and stamps
