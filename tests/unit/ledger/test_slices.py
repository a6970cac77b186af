"""Several drivers on one run: each shard is in one slice, and no two drivers work on the same shard."""

from __future__ import annotations

import io
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from blip2_actor.testing import FakeEngineConfig
from pipeline.attempts.store import read_attempts
from pipeline.errors import OutputInUse, RayStartFailed
from pipeline.inputs.shards import RunSlice
from pipeline.ledger import run_record
from pipeline.ledger.layout import RUN_FILE, lease_name, parse_lease_name
from pipeline.ledger.lease import Lease, read_holders
from pipeline.ledger.ledger import Ledger
from pipeline.progress import Console
from pipeline.report.status import RunStatus
from pipeline.run.prepare import prepare
from pipeline.run.run_job import _begin_or_join, run_job
from pipeline.settings.fingerprint import FingerprintMismatch
from pipeline.settings.job_settings import CaptionSettings
from pipeline.storage.folder import Folder
from tests.unit.inputs.run_without_ray import captions, prepare_run, work
from tests.unit.inputs.test_changes import write_tar


@pytest.fixture
def folder(tmp_path):
    return Folder(str(tmp_path / "out"))


def test_each_shard_is_in_one_slice_and_they_are_about_equal():
    """The division must not change between versions: drivers of a run may be started at different times."""
    slices = [RunSlice.parse(f"{number}/4") for number in (1, 2, 3, 4)]
    names = [f"part{n}.tar" for n in range(400)]
    counts = [sum(part.has(name) for name in names) for part in slices]
    assert sum(counts) == 400 and min(counts) > 70
    assert all(sum(part.has(name) for part in slices) == 1 for name in names)
    assert [name for name in names[:10] if slices[0].has(name)] == ["part3.tar", "part7.tar", "part8.tar"]


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "a/b", "1/0", "-1/4"])
def test_a_slice_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match=r"slice must be I/N .* got"):
        CaptionSettings(input=("in",), output="out", slice=text)


def test_what_changes_the_list_of_shards_is_for_a_command_without_a_slice():
    with pytest.raises(ValueError, match="slice must be left out with add_new"):
        CaptionSettings(input=("in",), output="out", slice="1/2", add_new=True)


@pytest.mark.parametrize(
    ("held", "wanted", "is_refused"),
    [
        ("1/2", "2/2", False),
        ("1/2", "1/2", True),
        ("1/2", "2/4", True),
        ("1/2", None, True),
        (None, "1/2", True),
    ],
)
def test_a_driver_is_refused_when_its_shards_may_be_those_of_another(folder, held, wanted, is_refused):
    parts = [None if text is None else RunSlice.parse(text) for text in (held, wanted)]
    assert [parse_lease_name(lease_name(part)) for part in parts] == parts
    with Lease(folder, parts[0]):
        if is_refused:
            with pytest.raises(OutputInUse, match="one driver at a time"), Lease(folder, parts[1]):
                pass
        else:
            with Lease(folder, parts[1]):
                assert len(read_holders(folder)) == 2
        assert list(read_holders(folder)) == [lease_name(parts[0])]
    assert read_holders(folder) == {}


def test_of_a_run_and_a_slice_that_start_together_on_two_machines_at_most_one_goes_on(folder, monkeypatch):
    """Both used to write their lease before either looked, and each waited until the other seemed dead."""
    monkeypatch.setattr("pipeline.ledger.lease._machine", lambda: "")  # leases of an unknown machine
    # A driver that looked later would find a lease without a heartbeat, and believe its holder dead.
    have_looked, have_written = threading.Barrier(2), threading.Barrier(2)

    class Simultaneous(Lease):
        def _take(self):
            have_looked.wait(60)
            super()._take()
            have_written.wait(60)

    def hold(part):
        try:
            with Simultaneous(folder, part, beat_s=0.01, dead_after_s=30):
                return True
        except OutputInUse:
            return False

    with ThreadPoolExecutor(2) as pool:
        assert sum(pool.map(hold, [None, RunSlice(1, 2)])) <= 1
    assert read_holders(folder) == {}


@pytest.mark.parametrize(("suspended", "next_one"), [(RunSlice(1, 2), None), (None, RunSlice(1, 2))])
def test_a_suspended_driver_sees_that_its_shards_were_taken_under_another_lease(
    folder, monkeypatch, suspended, next_one
):
    """It used to find its own lease unchanged, and to continue next to the other driver."""
    monkeypatch.setattr("pipeline.ledger.lease._machine", lambda: "")  # leases of an unknown machine
    with Lease(folder, suspended, beat_s=60) as lease:
        with Lease(folder, next_one, beat_s=0.01, dead_after_s=0.05):
            assert list(read_holders(folder)) == [lease_name(next_one)]
            assert not lease._is_mine()
        assert read_holders(folder) == {}


def test_dead_drivers_of_many_slices_are_waited_for_together(folder, monkeypatch):
    """Each used to cost half a minute at every start."""
    monkeypatch.setattr("pipeline.ledger.lease._machine", lambda: "")
    for number in range(1, 9):
        Lease(folder, RunSlice(number, 8))._take()
    started = time.monotonic()
    with Lease(folder, beat_s=0.02, dead_after_s=0.5):
        assert time.monotonic() - started < 3
        assert list(read_holders(folder)) == [lease_name(None)]


def test_two_slices_that_start_together_are_one_run(tmp_path):
    """Both have found an empty output; the second joins the run that the first has begun."""
    for name in "abcdef":
        write_tar(tmp_path / f"in/{name}.tar", f"{name}0", f"{name}1")
    jobs = [prepare_run(tmp_path, slice=text) for text in ("1/2", "2/2")]
    assert all(job.is_new for job in jobs)
    first = work(jobs[0])
    write_tar(tmp_path / "in/g.tar", "late")
    joined = _begin_or_join(jobs[1])
    assert joined.run.shards == jobs[0].run.shards and not joined.is_new
    second = work(joined)
    assert first.num_shards + second.num_shards == 6 and first.num_shards in range(1, 6)
    assert {shard: len(made) for shard, made in captions(tmp_path).items()} == {
        f"{n}.tar": 2 for n in "abcdef"
    }
    lines = RunStatus.read(str(tmp_path / "out")).lines()
    assert lines[:2] == ["12 rows = 12 ok + 0 failed", "6 shards = 6 written + 0 missing"]


@pytest.mark.parametrize("has_conditions", [True, False])
@pytest.mark.parametrize("prompt", [None, "a photo of"])
def test_of_slices_that_begin_a_run_at_the_same_moment_one_does(
    tmp_path, monkeypatch, has_conditions, prompt
):
    """Each used to overwrite the other's record, and the output had rows of two runs."""
    for name in "abcdef":
        write_tar(tmp_path / f"in/{name}.tar", name)
    jobs = [prepare_run(tmp_path, slice="1/2")]
    write_tar(tmp_path / "in/g.tar", "comes between the two listings")
    jobs.append(prepare_run(tmp_path, slice="2/2", prompt=prompt))
    have_loaded, have_looked, have_written = (threading.Barrier(2) for _ in range(3))
    begin = Ledger.begin

    def begin_together(ledger, run):
        have_loaded.wait(60)
        return begin(ledger, run)

    def find_none(folder):
        have_looked.wait(60)

    monkeypatch.setattr(Ledger, "begin", begin_together)
    if not has_conditions:
        monkeypatch.setattr(Folder, "put_new", lambda *args: False)
        monkeypatch.setattr(run_record, "read_run", find_none)
        monkeypatch.setattr(run_record, "time", SimpleNamespace(sleep=lambda _: have_written.wait(60)))

    def try_to_begin(job):
        try:
            return _begin_or_join(job)
        except FingerprintMismatch as error:
            assert "prompt" in str(error)
            return None

    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(try_to_begin, jobs))
    begun = jobs[0].ledger.require_run()
    (winner,) = [job for job in jobs if job.run.id == begun.id]
    assert begun.shards == winner.run.shards
    assert done.count(None) == (prompt is not None)
    assert {job.run.id for job in done if job is not None} == {begun.id}
    jobs[0].ledger.revise(begun.with_shards(begun.shards[:3]), ())
    assert jobs[0].ledger.require_run().shards == begun.shards[:3]
    assert sorted(jobs[0].ledger.folder.names()) == [RUN_FILE, begun.shard_list]


def test_a_slice_with_another_prompt_does_not_join(tmp_path):
    write_tar(tmp_path / "in/a.tar", "a0")
    jobs = [
        prepare_run(tmp_path, slice=f"{n}/2", prompt=prompt) for n, prompt in ((1, None), (2, "a photo of"))
    ]
    work(jobs[0])
    with pytest.raises(FingerprintMismatch, match="prompt"):
        _begin_or_join(jobs[1])


def test_a_run_that_another_driver_has_begun_and_ended_meanwhile_is_not_begun_over_it(tmp_path):
    """Its record used to be replaced, and its captions then counted as those of another prompt."""
    write_tar(tmp_path / "in/a.tar", "a0")
    jobs = [prepare_run(tmp_path, prompt=prompt) for prompt in (None, "a photo of")]
    work(jobs[0])
    with pytest.raises(FingerprintMismatch, match="prompt"):
        _begin_or_join(jobs[1])


def test_a_slice_without_a_shard_does_not_decide_on_the_dtype_of_the_run(tmp_path, monkeypatch):
    """It needs no worker, and used to begin the run in the dtype of the driver's own CPU."""

    def connect(run_id=""):
        raise RayStartFailed("no cluster")

    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    monkeypatch.setattr("pipeline.run.run_job.connected", connect)
    write_tar(tmp_path / "in/part3.tar", "a0")  # belongs to slice 1 of 4
    settings = CaptionSettings(input=(str(tmp_path / "in"),), output=str(tmp_path / "out"), slice="2/4")
    job = prepare(settings, FakeEngineConfig(dtype="auto"))
    assert not job.part.shards
    with pytest.raises(RayStartFailed):
        run_job(job, Console(io.StringIO()))
    assert job.ledger.load() is None


def test_the_end_of_a_slice_is_not_that_of_the_run(tmp_path):
    write_tar(tmp_path / "in/part3.tar", "a0")  # belongs to slice 1 of 4
    job = prepare_run(tmp_path, slice="2/4")
    run_job(job, Console(io.StringIO()))
    (attempt,) = read_attempts(job.ledger.folder)
    assert attempt.reason == "all shards of slice 2/4 are finished"


def test_a_slice_leaves_files_alone_that_another_driver_may_be_writing(tmp_path):
    write_tar(tmp_path / "in/a.tar", "a0")
    half = tmp_path / "out/_blip2/tmp/half"
    half.parent.mkdir(parents=True)
    half.touch()
    work(prepare_run(tmp_path, slice="1/1"))
    assert half.exists()
    work(prepare_run(tmp_path))
    assert not half.exists()


def test_status_names_the_driver_of_each_slice(tmp_path):
    write_tar(tmp_path / "in/a.tar", "a0")
    job = prepare_run(tmp_path, slice="1/2")
    job.ledger.begin(job.run)
    with Lease(job.ledger.folder, RunSlice(1, 2)), Lease(job.ledger.folder, RunSlice(2, 2)):
        lines = [line for line in RunStatus.read(str(tmp_path / "out")).lines() if "running" in line]
    assert [line.partition(":")[0] for line in lines] == ["slice 1/2 running", "slice 2/2 running"]
