"""Input and output in a failing store: first each kind of request fails, then all requests for a while."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from blip2_actor.testing import FakeEngineConfig, captions_made
from pipeline.ledger.scan import scan_output
from pipeline.progress import Console
from pipeline.run.prepare import prepare
from pipeline.run.run_job import run_job
from pipeline.settings.job_settings import CaptionSettings
from pipeline.storage.filesystems import open_filesystem
from pipeline.storage.folder import Folder
from tests.chaos.stores.faulty_s3 import FaultyStore, faulty_store
from tests.integration.inputs import right_caption, write_tars
from tests.small_ray import small_ray


@pytest.fixture(scope="module")
def two_cpus(own_ray: None) -> Iterator[None]:
    """A local Ray with two CPUs."""
    with small_ray(num_cpus=2):
        yield


@pytest.fixture(scope="module")
def store() -> Iterator[FaultyStore]:
    with faulty_store() as started:
        open_filesystem(started.uri("bucket"))[0].create_dir("bucket")
        yield started


def test_a_small_file_is_one_request(store):
    """By default Arrow tries three times, which is too few for a job that writes thousands of fragments."""
    folder = Folder(store.uri("bucket/small"), retry_for_s=30)
    store.fail(each=1)
    folder.put("_blip2/fragments/a", b"1")
    assert store.failures() == {"PUT _blip2/fragments": 1}
    assert folder.get("_blip2/fragments/a") == b"1"


@pytest.mark.usefixtures("two_cpus")
def test_the_store_fails_while_a_job_reads_and_writes(store, tmp_path):
    """Each kind of request fails once; when the first fragment is written, all requests fail for longer than
    Arrow's client retries. No row may be lost or captioned twice, and nothing may be left behind."""
    truth = write_tars(tmp_path / "in", num_tars=4, rows_per_tar=40)
    filesystem, _ = open_filesystem(store.uri("bucket"))
    pafs.copy_files(
        str(tmp_path / "in"),
        "bucket/in",
        source_filesystem=pafs.LocalFileSystem(),
        destination_filesystem=filesystem,
    )
    settings = CaptionSettings(input=(store.uri("bucket/in"),), output=store.uri("bucket/out"))
    engine = FakeEngineConfig(trace=str(tmp_path / "trace"))
    store.fail(each=1, outage_at="PUT _blip2/fragments")
    result = run_job(prepare(settings, engine), Console(io.StringIO()))
    failures = store.failures()
    store.fail(each=0)
    assert (result.num_ok, result.exit_status(0.0)) == (160, 0)
    assert len(captions_made(tmp_path / "trace")) == 160
    expected = {f"{method} _blip2/fragments" for method in ("PUT", "GET")}
    expected |= {
        "LIST",
        "GET .tar",
        "PUT /report.json",
        "PUT .parquet",
        "POST other",
    }  # the last one deletes many objects at once
    assert expected <= {k for k, n in failures.items() if n == 1}
    assert failures["outage"] > 20, failures
    for shard, images in truth.items():
        with filesystem.open_input_file(f"bucket/out/{shard}.parquet") as file:
            table = pq.read_table(file)
        assert table["key"].to_pylist() == list(images)
        assert table["caption"].to_pylist() == [right_caption(image) for image in images.values()]
    left = scan_output(Folder(settings.output))
    assert (dict(left.fragments), left.shard_reports, left.leftovers) == ({}, {}, ())
