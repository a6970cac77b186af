"""An address becomes the bytes of its image, or a status with the reason; never an error of the actor."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pyarrow as pa
import pytest

from blip2_actor import ImageLimits
from pipeline.fetching.fetch_settings import FetchSettings
from pipeline.fetching.image_loader import NUM_THREADS, ImageLoader
from pipeline.inputs.reader import ADDRESS
from pipeline.stages import decode
from pipeline.stages.decode import PIXELS, DecodeStage
from tests.integration.inputs import SIZE_PX, png
from tests.unit.fetching.web_server import web_server

LOOPBACK = FetchSettings(allow_private_hosts=("127.0.0.1",), fetch_patience_s=0.0)
MAX_BYTES = 1000


@pytest.fixture
def loader() -> Iterator[ImageLoader]:
    with closing(ImageLoader(LOOPBACK, MAX_BYTES)) as loader:
        yield loader


def test_every_kind_of_address_is_loaded_in_order(loader: ImageLoader, tmp_path: Path) -> None:
    (tmp_path / "a b.png").write_bytes(b"on disk")
    uri = f"data:image/png;base64,{base64.b64encode(b'inside').decode()}"
    with web_server({"/a": [b"on the web"]}) as site:
        addresses = [
            f"{site.url}/a",
            f"{tmp_path}/a b.png",
            uri,
            f"file://{tmp_path}/a%20b.png",
        ] * NUM_THREADS
        images = list(loader.load(addresses))
    assert (
        images
        == [(content, None, None) for content in (b"on the web", b"on disk", b"inside", b"on disk")]
        * NUM_THREADS
    )


def test_what_cannot_be_loaded_costs_its_row_and_says_why(loader: ImageLoader, tmp_path: Path) -> None:
    (tmp_path / "large.png").write_bytes(bytes(MAX_BYTES + 1))
    (tmp_path / "empty.png").touch()
    os.mkfifo(tmp_path / "pipe")
    # A server that fails is left alone for a while, whatever was asked of it.
    with (
        web_server({"/large": [bytes(MAX_BYTES + 1)], "/empty": [b""]}) as site,
        web_server({"/busy": [503]}) as busy_site,
    ):
        cases = {
            f"{site.url}/large": ("too_large", "more than max_bytes"),
            f"{site.url}/gone?token=secret": ("fetch_failed", "status 404"),
            f"{site.url}/empty": ("missing_image", "no bytes"),
            f"{busy_site.url}/busy": ("fetch_failed", "status 503"),
            "http://10.0.0.1/a": ("refused", "10.0.0.1; if you trust the host, give --allow"),
            f"{tmp_path}/large.png": ("too_large", f"more than {MAX_BYTES}"),
            f"{tmp_path}/absent.png": ("unreadable", "absent.png"),
            f"{tmp_path}/empty.png": ("missing_image", "empty"),
            f"{tmp_path}/pipe": ("unreadable", "a regular file"),
            f"{tmp_path}": ("unreadable", "a regular file"),
            "/dev/zero": ("unreadable", "a regular file"),
            "a\x00b": ("unreadable", "null"),
            "foo://x/y": ("unreadable", "foo"),
            "github://x/y": ("unreadable", "'org' and 'repo'"),  # was a TypeError, which ended the job
            "dir://x/y": ("unreadable", "a URI that fsspec knows"),
            "hf://": ("unreadable", "must name a repository"),
            "hf://x": ("unreadable", "must be 'namespace/name'"),  # was tried again for half a minute
            "data:image/png,abc": ("undecodable", "not in base64"),
        }
        found = list(loader.load(cases))
    assert {
        address: (status, reason in str(error))
        for (address, (_, reason)), (_, status, error) in zip(cases.items(), found, strict=True)
    } == {address: (status, True) for address, (status, _) in cases.items()}
    assert not any("secret" in str(error) for _, _, error in found)


def test_web_addresses_are_refused_unless_fetching_is_switched_on() -> None:
    """A path in a column of the `datasets` library may be a URL, which was asked for without any guard."""
    with web_server({"/a": [b"image"]}) as site, closing(ImageLoader(None, MAX_BYTES)) as loader:
        ((image, status, _),) = loader.load([f"{site.url}/a"])
        assert (image, status, site.num_requests.total()) == (None, "refused", 0)


def test_the_decode_stage_loads_what_rows_name_and_keeps_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loaded images are decoded in parts, so that a table of many large ones is never held at once."""
    monkeypatch.setattr(decode, "LOADED_BYTES", 2 * len(png(0)))
    with web_server({f"/{n}": [png(n)] for n in range(4)}) as site:
        urls = [f"{site.url}/{n}" for n in (0, 1, 9, 2, 3)]
        table = pa.table(
            {
                "image": pa.array([png(5), *[None] * 6], pa.binary()),
                "status": pa.array([None] * 6 + ["unreadable"], pa.string()),
                "error": pa.array([None] * 6 + ["why"], pa.string()),
                ADDRESS: pa.array([None, *urls, None], pa.string()),
            }
        )
        limits = ImageLimits()
        with closing(DecodeStage(SIZE_PX, limits, "image", fetch=LOOPBACK)) as decoding:
            parts = list(decoding(table))
        with closing(DecodeStage(SIZE_PX, limits, "image")) as decoding:
            (right,) = decoding(pa.table({"image": [png(5), png(0), png(1), b"", png(2), png(3), b""]}))
    assert len(parts) > 1
    out = pa.concat_tables(parts)
    assert out["status"].to_pylist() == ["ok", "ok", "ok", "fetch_failed", "ok", "ok", "unreadable"]
    assert out[PIXELS].to_pylist() == right[PIXELS].to_pylist()
    assert out["sha256"].to_pylist()[0] is not None and out["sha256"].to_pylist()[3] is None
    assert ADDRESS not in out.column_names
