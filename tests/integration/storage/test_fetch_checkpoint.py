"""A checkpoint in a bucket is fetched once per machine, completely or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import pytest
from huggingface_hub import DryRunFileInfo
from moto.server import ThreadedMotoServer

from blip2_actor import EngineConfig
from blip2_actor.checkpoints import download
from blip2_actor.checkpoints.checkpoint import DEMO_FOLDER, resolve


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serve the demo checkpoint through the S3 protocol, and start with an empty cache."""
    monkeypatch = pytest.MonkeyPatch()
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    for name, value in (
        ("AWS_ENDPOINT_URL", endpoint),
        ("AWS_ACCESS_KEY_ID", "key"),
        ("AWS_SECRET_ACCESS_KEY", "secret"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
    ):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    client = boto3.client("s3")
    client.create_bucket(Bucket="models")
    for path in DEMO_FOLDER.iterdir():
        client.upload_file(str(path), "models", f"demo/{path.name}")
    client.put_object(Bucket="models", Key="empty/readme.md", Body=b"no checkpoint")
    yield "s3://models"
    server.stop()
    monkeypatch.undo()


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the name of every file fetched from the store."""
    import s3fs

    names: list[str] = []
    get_file = s3fs.S3FileSystem.get_file

    def record(self: s3fs.S3FileSystem, name: str, *args: Any, **options: Any) -> None:
        names.append(name)
        get_file(self, name, *args, **options)

    monkeypatch.setattr(s3fs.S3FileSystem, "get_file", record)
    return names


def test_describing_fetches_no_weights(bucket: str, fetched: list[str]) -> None:
    """A driver without a device must not download 15 GB to learn the image size."""
    info = EngineConfig(model=f"{bucket}/demo", device="cpu").info()
    assert info.image_size_px == 64
    assert fetched
    assert not [name for name in fetched if name.endswith(".safetensors")]
    assert resolve(f"{bucket}/demo").digest() == info.digest
    assert len([name for name in fetched if name.endswith(".safetensors")]) == 1


def test_actors_of_one_machine_fetch_once(
    bucket: str, fetched: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Eight actors that start together must not fetch eight times, nor read an incomplete file."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with ThreadPoolExecutor(8) as pool:
        checkpoints = list(pool.map(resolve, [f"{bucket}/demo"] * 8))
    assert len({c.folder for c in checkpoints}) == 1
    assert len(fetched) == len(set(fetched)) > 3
    assert checkpoints[0].config.vision_config.image_size == 64
    weights = (checkpoints[0].folder / "model.safetensors").read_bytes()
    assert weights == (DEMO_FOLDER / "model.safetensors").read_bytes()


def test_an_interrupted_fetch_is_resumed(
    bucket: str, fetched: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An incomplete file must not count, and the complete ones must not be fetched again."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = resolve(f"{bucket}/demo", with_weights=False).folder
    (folder / "model.safetensors.partial").write_bytes(b"half")
    fetched.clear()
    weights = (resolve(f"{bucket}/demo").folder / "model.safetensors").read_bytes()
    assert weights == (DEMO_FOLDER / "model.safetensors").read_bytes()
    assert len(fetched) == 1


def test_changed_content_under_the_same_name_has_another_digest(bucket: str) -> None:
    """Weights after more training have the same size as before; a resumed run must notice the change."""
    client = boto3.client("s3")
    for path in DEMO_FOLDER.iterdir():
        client.upload_file(str(path), "models", f"changing/{path.name}")
    before = EngineConfig(model=f"{bucket}/changing", device="cpu").info().digest
    assert before == EngineConfig(model=f"{bucket}/demo", device="cpu").info().digest
    weights = bytearray((DEMO_FOLDER / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    client.put_object(Bucket="models", Key="changing/model.safetensors", Body=bytes(weights))
    assert EngineConfig(model=f"{bucket}/changing", device="cpu").info().digest != before


def test_a_hub_model_is_described_without_its_weights(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Uses the hub's client without downloads. The digest is the commit, with or without weights."""
    commit = "0123456789abcdef0123456789abcdef01234567"

    def snapshot_download(
        model: str, revision: str | None, allow_patterns: list[str], dry_run: bool = False
    ) -> str | list[DryRunFileInfo]:
        if dry_run:
            return []
        folder = tmp_path / "snapshots" / commit
        folder.mkdir(parents=True, exist_ok=True)
        for path in DEMO_FOLDER.iterdir():
            if any(path.match(pattern) for pattern in allow_patterns):
                shutil.copy(path, folder)
        return str(folder)

    monkeypatch.setattr(download, "snapshot_download", snapshot_download)
    assert EngineConfig(model="some/model", device="cpu").info().digest == commit
    assert not list(tmp_path.rglob("*.safetensors"))
    assert resolve("some/model").digest() == commit
    assert list(tmp_path.rglob("*.safetensors"))


def test_a_folder_without_a_checkpoint_is_refused(bucket: str) -> None:
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        resolve(f"{bucket}/empty")
    with pytest.raises(OSError, match="no-such-bucket/model cannot be read"):
        resolve("s3://no-such-bucket/model")


def test_a_checkpoint_of_lavis_in_a_bucket_is_one_file(
    bucket: str, fetched: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its folder also holds the adapters of other epochs, each as large as the model."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    client = boto3.client("s3")
    for epoch in range(2):
        client.put_object(Bucket="models", Key=f"lavis/checkpoint_{epoch}.pth", Body=b"%d" % epoch)
    uri = f"{bucket}/lavis/checkpoint_1.pth"
    described = resolve("demo", with_weights=False, adapter=uri)
    assert fetched == []
    adapter = resolve("demo", adapter=uri).adapter
    assert adapter is not None
    assert (adapter.folder.name, adapter.folder.read_bytes()) == ("checkpoint_1.pth", b"1")
    assert resolve("demo", adapter=uri).digest() == described.digest()
    assert len(fetched) == 1
