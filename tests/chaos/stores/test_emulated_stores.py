"""Input, output, lease and model in Ceph's S3 and in emulators of Azure and Google, where installed."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import fsspec
import pyarrow.parquet as pq
import pytest
import ray

from blip2_actor.checkpoints.checkpoint import DEMO_FOLDER, resolve
from blip2_actor.testing import FakeEngineConfig, captions_made
from pipeline.cli.main import main
from pipeline.errors import InputError, OutputInUse
from pipeline.inputs.listing import list_shards
from pipeline.inputs.stamps import size_in
from pipeline.ledger.fragments import read_fragment
from pipeline.ledger.lease import Lease
from pipeline.ledger.ledger import Ledger
from pipeline.ledger.scan import scan_output
from pipeline.progress import Console
from pipeline.report.status import RunStatus
from pipeline.run.prepare import prepare
from pipeline.run.run_job import run_job
from pipeline.settings.job_settings import CaptionSettings
from pipeline.storage.folder import Folder
from pipeline.storage.secrets import hide_secrets
from tests.chaos.cluster import wait_until
from tests.chaos.stores.ceph import ceph
from tests.chaos.stores.emulators import Store, azure, google, upload
from tests.integration.inputs import right_caption, write_tars
from tests.unit.ledger.test_lease import race_for

pytestmark = pytest.mark.filterwarnings("ignore:Sending a large body directly:ResourceWarning:aiohttp")


@pytest.fixture(scope="module", params=["s3", "az", "abfs", "gs"])
def store(
    request: pytest.FixtureRequest, own_ray: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Store]:
    """Each store in turn."""
    folder = tmp_path_factory.mktemp(request.param)
    starts = {"s3": ceph, "gs": lambda _: google()}
    with starts.get(request.param, partial(azure, request.param))(folder) as started:
        os.environ.update(started.environment)
        fsspec.get_filesystem_class(started.model_scheme).clear_instance_cache()  # drops old ports
        yield started


@pytest.fixture
def two_cpus(store: Store) -> Iterator[None]:
    """A local Ray whose workers can reach the store."""
    options = {"object_store_memory": 200 << 20, "include_dashboard": False, "log_to_driver": False}
    ray.init(address="local", num_cpus=2, **options)
    yield
    ray.shutdown()


def test_a_folder_works_as_on_a_disk(store):
    folder = Folder(store.uri("folder"))
    assert (folder.names(), folder.get("a/b")) == ([], None)
    folder.put("a/b", b"1")
    folder.put("a/b", b"2")
    folder.put("é #1/c d", os.urandom(20 << 20))
    assert folder.get("a/b") == b"2"
    assert sorted(folder.names()) == ["a/b", "é #1/c d"]
    assert [(file.name, file.num_bytes) for file in folder.files("a")] == [("a/b", 1)]
    assert folder.files("a")[0].written > 1.7e9
    age = folder.seconds_since_write("a/b")
    assert age is not None and age < 60 and folder.seconds_since_write("none") is None
    for _ in range(2):
        folder.delete("a/b")
        folder.erase("é #1")
    assert folder.names() == []
    folder.require_writable()


def test_one_driver_holds_the_lease(store):
    folder = Folder(store.uri("lease"))
    with Lease(folder), pytest.raises(OutputInUse), Lease(folder):
        pass
    assert folder.names() == []


def test_of_drivers_that_start_together_one_gets_the_lease(store, monkeypatch):
    folder = Folder(store.uri("race"))
    if store.scheme == "abfs":  # Arrow cannot write conditionally; the others notice within a heartbeat
        assert not folder.put_new("x", b"") and folder.names() == []
        return
    assert (folder.put_new("x", b"1"), folder.put_new("x", b"2"), folder.get("x")) == (True, False, b"1")
    folder.delete("x")
    assert len(race_for(folder, monkeypatch)) == 1
    assert folder.names() == []


def test_a_bucket_that_is_not_there_is_refused_without_the_secret(store):
    uri = store.uri("x").replace("bucket/x", "absent/x")
    with pytest.raises(ValueError, match="output must be a folder that can be written") as refusal:
        Folder(uri).require_writable()
    assert store.secret not in str(refusal.value) and "sig=" not in str(refusal.value)
    with pytest.raises(InputError) as refused:
        list_shards(uri)
    assert "sig=" not in hide_secrets(str(refused.value)), "as every command prints it"


@pytest.mark.usefixtures("two_cpus")
def test_a_job_from_store_to_store_and_again(store, tmp_path, capsys):
    truth = write_tars(tmp_path / "in", num_tars=2, rows_per_tar=20)
    upload(store, tmp_path / "in", "in")
    shards = list_shards(store.uri("in"))
    assert all(size_in(stamp) and stamp[-1] != "@" for shard in shards for stamp in shard.stamps)
    settings = CaptionSettings(input=(store.uri("in"),), output=store.uri("out"))
    engine = FakeEngineConfig(trace=str(tmp_path / "trace"))
    said = io.StringIO()
    for _ in range(2):
        result = run_job(prepare(settings, engine), Console(said))
        assert (result.num_ok, result.exit_status(0.0)) == (40, 0)
    assert len(captions_made(tmp_path / "trace")) == 40
    folder = Folder(settings.output)
    for shard, images in truth.items():
        table = folder.read(f"{shard}.parquet", pq.read_table)
        assert table["key"].to_pylist() == list(images)
        assert table["caption"].to_pylist() == [right_caption(image) for image in images.values()]
    assert not Ledger(folder).scan().fragments
    assert main(["verify", "--output", settings.output, "--input", *settings.input]) == 0
    printed = capsys.readouterr()
    shown = said.getvalue() + printed.out + printed.err + "".join(RunStatus.read(settings.output).lines())
    assert store.secret not in shown and "sig=" not in shown


def test_a_driver_that_is_killed_is_resumed(store, tmp_path):
    truth = write_tars(tmp_path / "in", num_tars=3, rows_per_tar=40)
    upload(store, tmp_path / "in", "killed/in")
    gate, trace = tmp_path / "gate", tmp_path / "trace"
    gate.touch()
    settings = {"input": [store.uri("killed/in")], "output": store.uri("killed/out")}
    settings["placement"] = {"calls_per_actor": 1}
    engine = {"trace": str(trace), "gate": str(gate), "gate_after": 50}
    command = [sys.executable, "-m", "tests.drive", json.dumps({"settings": settings, "engine": engine})]
    folder = Folder(store.uri("killed/out"))
    with (tmp_path / "log").open("w") as log:
        driver = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            wait_until(lambda: scan_output(folder).fragments, driver, tmp_path / "log")
        finally:
            driver.kill()
            driver.wait()
        fragments = scan_output(folder).fragments.values()
        written = [row for of_shard in fragments for row in captions_in(folder, of_shard)]
        gate.unlink()
        assert subprocess.run(command, stdout=log, stderr=log, timeout=200).returncode == 0
    for shard, images in truth.items():
        table = folder.read(f"{shard}.parquet", pq.read_table)
        assert table["caption"].to_pylist() == [right_caption(image) for image in images.values()]
    made = Counter(captions_made(trace))
    assert written and all(made[caption] == 1 for caption in written)


def captions_in(folder, fragments):
    """Return the captions that have reached the store."""
    return [
        caption
        for rows in (read_fragment(folder, fragment.name) for fragment in fragments)
        if rows is not None
        for caption in rows["caption"].to_pylist()
    ]


def test_a_checkpoint_is_fetched(store, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    upload(store, Path(DEMO_FOLDER), "models/demo")
    described = resolve(store.model_uri("models/demo"), with_weights=False)
    fetched = resolve(store.model_uri("models/demo"))
    assert fetched.digest() == described.digest()
    weights = (fetched.folder / "model.safetensors").read_bytes()
    assert weights == (DEMO_FOLDER / "model.safetensors").read_bytes()
