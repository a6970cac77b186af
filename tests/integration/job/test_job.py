"""The captioning job on a real local Ray with a fake engine: every row once, whatever happens."""

import io
import os
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blip2_actor import ImageLimits
from blip2_actor.testing import FakeEngineConfig, captions_made
from pipeline.cli.commands import caption
from pipeline.errors import OutputInUse
from pipeline.ledger.layout import ATTEMPTS, LOGS, RUN_FILE, SHARD_LIST, SUMMARIES
from pipeline.ledger.lease import Lease
from pipeline.ledger.ledger import Ledger
from pipeline.ledger.reconcile import Reconciliation
from pipeline.progress import Console
from pipeline.run.committers import Committer
from pipeline.run.prepare import prepare, prepare_retry
from pipeline.run.run_job import run_job
from pipeline.settings.fingerprint import FingerprintMismatch
from pipeline.settings.job_settings import CaptionSettings
from pipeline.settings.retry_settings import RetrySettings
from pipeline.storage.folder import Folder
from tests.integration.inputs import (
    BROKEN,
    check_output,
    png,
    read_output,
    right_caption,
    write_tar,
    write_tars,
)

RECORDS = (ATTEMPTS, LOGS, SUMMARIES)
"""Files that finished runs keep besides the run itself."""

pytestmark = pytest.mark.usefixtures("local_ray")


def settings(tmp_path, **changes) -> CaptionSettings:
    changes = {"input": (str(tmp_path / "in"),), "output": str(tmp_path / "out")} | changes
    return CaptionSettings(**changes)


@dataclass(frozen=True)
class Finished:
    root: Path
    truth: dict[str, dict[str, bytes]]
    result: Reconciliation


def run(caption_settings, engine=None, console=None):
    engine = engine or FakeEngineConfig()
    return run_job(prepare(caption_settings, engine), console or Console(io.StringIO()))


def test_every_row_in_its_shards_file_in_order_and_broken_images_cost_only_their_rows(tmp_path):
    truth = write_tars(tmp_path / "in", num_tars=3, rows_per_tar=40, broken_every=7)
    said = io.StringIO()
    result = run(settings(tmp_path), console=Console(said))
    check_output(tmp_path / "out", truth)
    num_broken = sum(image == BROKEN for images in truth.values() for image in images.values())
    assert (result.num_rows, result.num_failed) == (120, num_broken)
    assert result.by_status["undecodable"] == num_broken
    assert result.exit_status(0.0) == 2
    assert result.exit_status(0.5) == 0
    assert "bottleneck" in said.getvalue()
    assert "\ndecode sandbox: " in said.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory, local_ray) -> Finished:
    """A finished run; the tests that use it do not change it."""
    root = tmp_path_factory.mktemp("finished")
    truth = write_tars(root / "in", num_tars=2, rows_per_tar=10)
    return Finished(root, truth, run(settings(root), FakeEngineConfig(trace=str(root / "trace"))))


def test_the_same_command_again_does_nothing_and_reports_the_same(finished):
    again = run(settings(finished.root), FakeEngineConfig(trace=str(finished.root / "trace")))
    assert again == finished.result
    assert len(captions_made(finished.root / "trace")) == 20


def test_only_results_and_the_record_are_left(finished):
    folder = Folder(str(finished.root / "out"))
    state = Ledger(folder).scan()
    assert (dict(state.fragments), state.shard_reports, state.leftovers) == ({}, {}, ())
    kept = [name for name in folder.names("_blip2") if not name.startswith(RECORDS)]
    assert set(kept) == {RUN_FILE, SHARD_LIST}


def test_the_footer_names_the_run(finished):
    job = prepare(settings(finished.root), FakeEngineConfig())
    metadata = pq.read_schema(finished.root / "out" / "part0" / "00000.tar.parquet").metadata
    assert metadata[b"blip2.fingerprint"].decode() == job.run.fingerprint.digest


def test_an_input_that_has_grown_is_not_listed_again(finished):
    late = finished.root / "in" / "late.tar"
    write_tar(late, {"late": png(99)})
    run(settings(finished.root))
    late.unlink()
    check_output(finished.root / "out", finished.truth)


def test_another_model_is_refused_by_name(finished):
    with pytest.raises(FingerprintMismatch, match="model: "):
        prepare(settings(finished.root), FakeEngineConfig(model="other"))


@pytest.mark.slow
def test_another_prompt_is_refused_by_name_and_forked_on_request(finished):
    with pytest.raises(FingerprintMismatch, match="prompt: nothing -> 'a photo of'"):
        prepare(settings(finished.root, prompt="a photo of"), FakeEngineConfig())
    forked = settings(finished.root, prompt="a photo of", fork=True)
    job = prepare(forked, FakeEngineConfig())
    assert job.ledger.folder.uri.startswith(str(finished.root / "out-"))
    run_job(job, Console(io.StringIO()))
    check_output(job.ledger.folder.uri, finished.truth, prompt="a photo of")
    check_output(finished.root / "out", finished.truth)
    assert not prepare(forked, FakeEngineConfig()).is_new, "the same command resumes the same fork"


def test_a_second_driver_is_refused(tmp_path):
    write_tars(tmp_path / "in", num_tars=1, rows_per_tar=5)
    with Lease(Folder(str(tmp_path / "out"))), pytest.raises(OutputInUse, match="process"):
        run(settings(tmp_path))


def test_a_tar_that_ends_early_is_partial_and_an_empty_one_has_an_empty_file(tmp_path):
    truth = write_tars(tmp_path / "in", num_tars=2, rows_per_tar=30)
    cut = tmp_path / "in" / "part0" / "00000.tar"
    os.truncate(cut, cut.stat().st_size // 2)
    write_tar(tmp_path / "in" / "empty.tar", {})
    result = run(settings(tmp_path))
    assert [summary.shard for summary in result.partial] == ["part0/00000.tar"]
    assert result.partial[0].reason
    assert result.exit_status(0.0) == 2
    readable = len(read_output(tmp_path / "out", "part0/00000.tar"))
    assert 5 < readable < 30
    assert read_output(tmp_path / "out", "empty.tar") == []
    first = dict(list(truth["part0/00000.tar"].items())[:readable])
    check_output(tmp_path / "out", {**truth, "part0/00000.tar": first, "empty.tar": {}})


def test_retry_runs_the_rows_that_are_not_ok_and_merges_them_in_place(tmp_path, monkeypatch):
    """Most rows fail again, but a retry runs only bad rows, which say nothing about the input; it goes on."""
    truth = write_tars(tmp_path / "in", num_tars=2, rows_per_tar=20)
    images = truth["part0/00000.tar"]
    images |= {"image-000005": BROKEN, "image-000009": BROKEN}
    write_tar(tmp_path / "in" / "part0" / "00000.tar", images)
    refused = right_caption(images["image-000003"])
    trace = str(tmp_path / "trace")
    first = run(settings(tmp_path), FakeEngineConfig(trace=trace, refuses_on=(refused,)))
    assert dict(first.by_status) == {"ok": 37, "undecodable": 2, "refused": 1}
    other = tmp_path / "out" / "part1" / "00001.tar.parquet"
    untouched = other.stat().st_mtime_ns
    monkeypatch.setattr("pipeline.run.tracker.FAILURES_COUNT_AFTER_ROWS", 2)
    result = run_retry(tmp_path, FakeEngineConfig(trace=trace))
    assert dict(result.by_status) == {"ok": 38, "undecodable": 2}
    check_output(tmp_path / "out", truth)
    assert Counter(captions_made(trace))[refused] == 2
    assert len(captions_made(trace)) == 39
    assert other.stat().st_mtime_ns == untouched


@pytest.mark.slow
def test_retry_reads_a_partial_shard_again(tmp_path):
    truth = write_tars(tmp_path / "in", num_tars=1, rows_per_tar=30)
    tar = tmp_path / "in" / "part0" / "00000.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[: len(whole) // 2])
    assert len(run(settings(tmp_path)).partial) == 1
    tar.write_bytes(whole)
    result = run_retry(tmp_path)
    assert (result.num_rows, result.partial) == (30, [])
    check_output(tmp_path / "out", truth)


def test_a_changed_tar_is_refused_before_work_and_made_again_whole_on_request(tmp_path, capsys):
    """The workers must write under the new generation of the shard, and the driver must look for it there."""
    truth = write_tars(tmp_path / "in", num_tars=2, rows_per_tar=10)
    write_tar(tmp_path / "in/part0/00000.tar", {"old": png(99)})
    run(settings(tmp_path))
    write_tar(tmp_path / "in/part0/00000.tar", truth["part0/00000.tar"])
    trace = str(tmp_path / "trace")
    assert caption(settings(tmp_path), FakeEngineConfig(trace=trace)) == 3
    assert "part0/00000.tar (" in capsys.readouterr().err
    again = settings(tmp_path, redo_changed=True)
    assert caption(again, FakeEngineConfig(trace=trace)) == 0
    check_output(tmp_path / "out", truth)
    assert len(captions_made(trace)) == 10, "the other shard is not made again"
    left = {name for name in Folder(str(tmp_path / "out")).names("_blip2") if not name.startswith(RECORDS)}
    assert left == {RUN_FILE, SHARD_LIST}


def test_retry_takes_new_limits_of_time_and_memory_and_keeps_the_others(tmp_path):
    """Limits may change without changing rows, or a row that failed for lack of memory would fail forever."""
    write_tars(tmp_path / "in", num_tars=1, rows_per_tar=1)
    before = ImageLimits(max_pixels=10_000, cpu_s=1.0, wall_s=2.0, memory_bytes=64 << 20)
    job = prepare(settings(tmp_path, limits=before), FakeEngineConfig())
    job.ledger.begin(job.run)
    job.ledger.folder.put("part0/00000.tar.parquet", b"")  # so that the run counts as finished

    def limits(**given) -> ImageLimits:
        retrying = RetrySettings(output=str(tmp_path / "out"), **given)
        return prepare_retry(retrying, FakeEngineConfig()).settings.limits

    assert limits() == before
    assert limits(image_memory_bytes=1 << 30) == replace(before, memory_bytes=1 << 30)
    assert limits(image_cpu_s=9.0, image_wall_s=99.0) == replace(before, cpu_s=9.0, wall_s=99.0)
    with pytest.raises(ValueError, match="wall_s must be above 0 and finite, got 0"):
        RetrySettings(output="o", image_wall_s=0.0)


def test_retry_of_an_unfinished_run_is_refused(tmp_path):
    write_tars(tmp_path / "in", num_tars=1, rows_per_tar=5)
    job = prepare(settings(tmp_path), FakeEngineConfig())
    job.ledger.begin(job.run)
    with pytest.raises(ValueError, match="run the caption command again first"):
        run_retry(tmp_path)


def run_retry(tmp_path, engine=None):
    job = prepare_retry(RetrySettings(output=str(tmp_path / "out")), engine or FakeEngineConfig())
    return run_job(job, Console(io.StringIO()))


def test_an_engine_that_cannot_be_built_ends_the_job_with_its_own_message(tmp_path, capsys):
    write_tars(tmp_path / "in", num_tars=1, rows_per_tar=5)
    engine = FakeEngineConfig(fails_to_build="device must be there, got none")
    assert caption(settings(tmp_path), engine) == 1
    said = capsys.readouterr().err
    assert "blip2: the job has failed: device must be there, got none; finished work is kept" in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_shard_that_cannot_be_committed_ends_the_job_with_its_own_message(tmp_path, capsys, monkeypatch):
    """The job used to end in a traceback in which a second error hid the first. No caption may be lost."""

    class Failing(Committer):
        def commit(self, report):
            raise pa.ArrowInvalid(f"a fragment of {report.shard[:5]} is damaged")

    truth = write_tars(tmp_path / "in", num_tars=2, rows_per_tar=5)
    engine = FakeEngineConfig(trace=str(tmp_path / "trace"))
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.run.committers.Committer", Failing)
        assert caption(settings(tmp_path), engine) == 1
    said = capsys.readouterr().err
    assert re.search("job has failed: .*a fragment of part[01] is damaged; finished work is kept", said)
    assert "Traceback" not in said
    assert caption(settings(tmp_path), engine) == 0
    check_output(tmp_path / "out", truth)
    assert len(captions_made(tmp_path / "trace")) == 10
