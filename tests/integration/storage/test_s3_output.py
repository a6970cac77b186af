"""Output in an S3 bucket on loopback: the ledger works as on a disk."""

import gzip
import io
from collections import Counter
from collections.abc import Iterator
from urllib.parse import parse_qs

import boto3
import fsspec
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from moto.server import ThreadedMotoServer

from blip2_actor.testing import FakeEngineConfig, captions_made
from pipeline.cli.main import main
from pipeline.errors import OutputInUse
from pipeline.inputs.reader import ShardReport
from pipeline.inputs.shards import Shard
from pipeline.ledger.lease import Lease
from pipeline.ledger.ledger import Ledger
from pipeline.ledger.run_record import Run
from pipeline.progress import Console
from pipeline.report.status import RunStatus
from pipeline.run.prepare import prepare
from pipeline.run.run_job import run_job
from pipeline.settings.fingerprint import Fingerprint
from pipeline.settings.job_settings import CaptionSettings
from pipeline.storage.filesystems import open_filesystem
from pipeline.storage.folder import Folder
from pipeline.storage.fsspec_store import s3_requests
from tests.integration.inputs import right_caption, write_tars
from tests.unit.ledger.test_fragments import rows
from tests.unit.ledger.test_lease import race_for

REQUESTS: Counter[str] = Counter()
"""Counts of the requests that the server has answered, by method."""


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """Yield a URI template for a path; it contains a password, as URIs of users do."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    _, port = server.get_host_and_port()
    assert server._server is not None
    answer = server._server.app

    def count_and_answer(environ, start):
        REQUESTS[environ["REQUEST_METHOD"]] += 1
        return answer(environ, start)

    server._server.app = count_and_answer
    options = f"endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1&allow_bucket_creation=true"
    open_filesystem(f"s3://key:secret@bucket?{options}")[0].create_dir("bucket")
    yield "s3://key:secret@bucket/{}?" + options
    server.stop()


def raw_keys(bucket: str, prefix: str) -> list[str]:
    """Return every object, including those that Arrow shows as folders."""
    endpoint = parse_qs(bucket.partition("?")[2])["endpoint_override"][0]
    store = boto3.client(
        "s3",
        endpoint_url=f"http://{endpoint}",
        region_name="us-east-1",
        aws_access_key_id="key",
        aws_secret_access_key="secret",
    )
    return [item["Key"] for item in store.list_objects_v2(Bucket="bucket", Prefix=prefix).get("Contents", [])]


def test_a_folder_in_a_bucket_works_as_on_a_disk(bucket):
    folder = Folder(bucket.format("folder"))
    assert list(folder.names()) == []
    assert folder.get("a/b") is None
    folder.put("a/b", b"1")
    folder.put("a/b", b"2")
    folder.put("a/b/c", b"3")
    assert (folder.get("a/b"), folder.get("a/b/c")) == (b"2", b"3")
    assert sorted(folder.names()) == ["a/b", "a/b/c"]
    folder.delete("a/b")
    folder.delete("a/b")
    assert list(folder.names("a")) == ["a/b/c"]
    inner = folder.below("a/inner")
    inner.put("x/y", b"4")
    assert sorted(folder.names()) == ["a/b/c", "a/inner/x/y"]
    inner.erase()
    assert list(folder.names()) == ["a/b/c"]
    folder.require_writable()
    with Lease(folder), pytest.raises(OutputInUse), Lease(folder):
        pass


def test_of_drivers_that_start_together_one_gets_the_lease(bucket, monkeypatch):
    folder = Folder(bucket.format("race"))
    assert len(race_for(folder, monkeypatch, 2)) == 1
    assert folder.names() == []


@pytest.mark.parametrize("num_fragments", [1, 12])
@pytest.mark.parametrize("status", ["ok", "fetch_failed"])
def test_a_shard_costs_five_requests_and_two_for_each_fragment(bucket, num_fragments, status):
    """Arrow would ask for each fragment's size, and delete a folder by five requests and a file by three."""
    output = f"cost-{status}-{num_fragments}"
    REQUESTS.clear()
    finish_shard(bucket.format(output), num_fragments, status)
    may_improve = status != "ok"
    assert REQUESTS.total() == 2 * num_fragments + 5 + may_improve, REQUESTS
    assert raw_keys(bucket, f"{output}/") == [f"{output}/x/0.tar.parquet"]


@pytest.mark.parametrize("failing", ["cat_file", "call_s3"])
def test_arrow_makes_the_requests_that_another_client_cannot_make(bucket, failing, monkeypatch):
    """A failed request must not fail a commit, nor be repeated for every fragment."""
    asked: list[object] = []

    def fail(store, *args, **options):
        asked.append(args)
        raise TimeoutError

    uri = bucket.format(f"other-{failing}")
    store = s3_requests(uri)
    assert store.get(Folder(uri).filesystem, "bucket/none") is None
    monkeypatch.setattr(store._store, failing, fail, raising=True)
    REQUESTS.clear()
    finish_shard(uri, num_fragments=12)
    assert 1 <= len(asked) <= 12, "fragments are read at the same time"
    assert 12 * 2 + 5 < REQUESTS.total() <= 12 * 3 + 9
    asked.clear()
    finish_shard(uri, num_fragments=2, shard="x/1.tar")
    assert not asked


def finish_shard(uri: str, num_fragments: int, status: str = "ok", shard: str = "x/0.tar") -> None:
    ledger = Ledger(Folder(uri))
    for first in range(num_fragments):
        ledger.write_fragment(rows([first], shard=shard, status=status))
    report = ShardReport(shard=shard, num_rows=num_fragments, complete=True)
    ledger.store_shard_report(report)
    summary = ledger.commit(report, {})
    assert summary is not None and summary.by_status == {status: num_fragments}


def test_markers_of_emptied_folders_are_deleted_only_when_all_shards_are_finished(bucket, monkeypatch):
    """They used to stay, because Arrow leaves them, and each listing of the output returned all of them."""

    def not_installed(*args, **options):
        raise ImportError("s3fs")

    monkeypatch.setattr(fsspec, "filesystem", not_installed)
    folder = Folder(bucket.format("marked"))
    ledger = Ledger(folder)
    shards = [Shard(name=n, format="webdataset", root="/in", files=(n,)) for n in ("a.tar", "b.tar")]
    run = Run(Fingerprint({}), {}, tuple(shards))

    def finish(shard: str, status: str) -> None:
        ledger.write_fragment(rows([0], shard=shard, status=status))
        assert ledger.commit(ShardReport(shard=shard, num_rows=1, complete=True), {})

    def drop_markers() -> None:
        state = ledger.scan()
        ledger.drop_markers(state, ledger.reconcile(run, state))

    finish("a.tar", "failed")
    folder.put("_blip2/fragments/b.tar.rows/1.arrow", b"")
    folder.delete("_blip2/fragments/b.tar.rows/1.arrow")
    markers = [f"marked/_blip2/fragments/{shard.name}.rows/" for shard in shards]
    assert raw_keys(bucket, "marked/_blip2/") == markers
    drop_markers()
    assert raw_keys(bucket, "marked/_blip2/") == markers
    finish("b.tar", "undecodable")
    drop_markers()
    assert markers[0] in raw_keys(bucket, "marked/_blip2/"), "a row may improve"
    finish("a.tar", "ok")
    drop_markers()
    assert set(raw_keys(bucket, "marked/_blip2/")) <= {"marked/_blip2/"}
    assert sorted(folder.names()) == ["a.tar.parquet", "b.tar.parquet"]


def test_a_bucket_that_cannot_be_written_is_refused_without_the_password(bucket):
    uri = bucket.format("x").replace("bucket/x", "absent/x").replace("allow_bucket_creation=true", "")
    with pytest.raises(ValueError, match="output must be a folder that can be written") as refusal:
        Folder(uri).require_writable()
    assert "secret" not in str(refusal.value)


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_job_from_bucket_to_bucket_and_again(bucket, tmp_path, capsys):
    truth = write_tars(tmp_path / "in", num_tars=2, rows_per_tar=20)
    filesystem, root = open_filesystem(bucket.format("in"))
    pafs.copy_files(
        str(tmp_path / "in"),
        root,
        source_filesystem=pafs.LocalFileSystem(),
        destination_filesystem=filesystem,
    )
    settings = CaptionSettings(input=(bucket.format("in"),), output=bucket.format("out"))
    engine = FakeEngineConfig(trace=str(tmp_path / "trace"))
    said = io.StringIO()
    for _ in range(2):
        result = run_job(prepare(settings, engine), Console(said))
        assert (result.num_ok, result.exit_status(0.0)) == (40, 0)
    assert len(captions_made(tmp_path / "trace")) == 40
    for shard, images in truth.items():
        with filesystem.open_input_file(f"bucket/out/{shard}.parquet") as file:
            table = pq.read_table(file)
        assert table["key"].to_pylist() == list(images)
        assert table["caption"].to_pylist() == [right_caption(image) for image in images.values()]
        assert all(b"secret" not in value for value in table.schema.metadata.values())
    folder = Folder(settings.output)
    assert not Ledger(folder).scan().fragments
    assert not [key for key in raw_keys(bucket, "out/_blip2/") if "/fragments/" in key or "/ends/" in key]
    kept = [folder.get("_blip2/run.json"), gzip.decompress(folder.get("_blip2/shards.jsonl.gz") or b"")]
    assert all(content and b"secret" not in content for content in kept)
    assert "secret" not in said.getvalue() + "".join(RunStatus.read(settings.output).lines())
    verify = ["verify", "--output", settings.output, "--input", *settings.input]
    assert main(verify) == 0, capsys.readouterr()
    shard = next(iter(truth))
    content = folder.get(f"{shard}.parquet") or b""
    folder.put(f"{shard}.parquet", content[:-100])
    assert main(verify) == 1
    printed = capsys.readouterr()
    assert f"fail  {shard}.parquet: cannot be read: " in printed.out
    assert "secret" not in printed.out + printed.err
