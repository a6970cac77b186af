"""A checkpoint in a bucket: fetched once per machine, whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import boto3
import pytest
from moto.server import ThreadedMotoServer

from blip2_actor import checkpoint
from blip2_actor.checkpoint import DEMO_FOLDER, resolve


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The demonstration checkpoint behind a real S3 protocol, and an empty cache."""
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
    monkeypatch.setattr(checkpoint, "CACHE_FOLDER", tmp_path_factory.mktemp("cache"))
    client = boto3.client("s3")
    client.create_bucket(Bucket="models")
    for path in DEMO_FOLDER.iterdir():
        client.upload_file(str(path), "models", f"demo/{path.name}")
    client.put_object(Bucket="models", Key="empty/readme.md", Body=b"no checkpoint")
    yield "s3://models"
    server.stop()
    monkeypatch.undo()


def test_actors_of_one_machine_fetch_once(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight actors that start together must not fetch eight times, or read a half-fetched file."""
    import s3fs

    fetched = []
    real = s3fs.S3FileSystem.get_file
    monkeypatch.setattr(
        s3fs.S3FileSystem,
        "get_file",
        lambda self, *args, **kw: (fetched.append(args[0]), real(self, *args, **kw)),
    )
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(resolve, [f"{bucket}/demo"] * 8))
    assert len({c.folder for c in found}) == 1
    assert len(fetched) == len(set(fetched)) > 3
    assert found[0].config.vision_config.image_size == 64
    weights = (found[0].folder / "model.safetensors").read_bytes()
    assert weights == (DEMO_FOLDER / "model.safetensors").read_bytes()


def test_a_folder_without_a_checkpoint_is_refused(bucket: str) -> None:
    with pytest.raises(FileNotFoundError, match="must hold a checkpoint's files"):
        resolve(f"{bucket}/empty")
    with pytest.raises(OSError, match="must be a readable folder"):
        resolve("s3://no-such-bucket/model")
