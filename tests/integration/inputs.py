"""Small inputs with known captions: tars of random images, some of them broken."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from blip2_actor import decode_image
from blip2_actor.testing import fake_caption

SIZE_PX = 32
BROKEN = b"this is not an image"


@cache
def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@cache
def right_caption(image: bytes, prompt: str | None = None, size_px: int = SIZE_PX) -> str:
    return fake_caption(decode_image(image, size_px).array(size_px), prompt)


def write_tar(path: Path, images: Mapping[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, image in images.items():
            member = tarfile.TarInfo(f"{key}.png")
            member.size = len(image)
            tar.addfile(member, io.BytesIO(image))


def write_tars(
    folder: Path, num_tars: int, rows_per_tar: int, broken_every: int | None = None
) -> dict[str, dict]:
    """Write tars; return the images by key, in order, by shard."""
    truth: dict[str, dict[str, bytes]] = {}
    for tar in range(num_tars):
        images = {}
        for row in range(rows_per_tar):
            seed = tar * rows_per_tar + row
            is_broken = broken_every is not None and seed % broken_every == broken_every - 1
            images[f"image-{seed:06d}"] = BROKEN if is_broken else png(seed)
        name = f"part{tar % 2}/{tar:05d}.tar"
        write_tar(folder / name, images)
        truth[name] = images
    return truth


def read_output(output: Path | str, shard: str) -> list[dict]:
    return pq.read_table(f"{output}/{shard}.parquet").to_pylist()


def check_output(
    output: Path | str,
    truth: Mapping[str, Mapping[str, bytes]],
    prompt: str | None = None,
    size_px: int = SIZE_PX,
) -> None:
    """Assert that each row is in the file of its shard once, in order, with the right caption or status."""
    files = sorted(str(p.relative_to(output)) for p in Path(output).rglob("*.parquet"))
    assert files == sorted(f"{shard}.parquet" for shard in truth)
    for shard, images in truth.items():
        rows = read_output(output, shard)
        assert [row["key"] for row in rows] == list(images)
        assert [row["row"] for row in rows] == list(range(len(images)))
        assert {row["shard"] for row in rows} <= {shard}
        for row, image in zip(rows, images.values(), strict=True):
            if image == BROKEN:
                assert (row["status"], row["caption"]) == ("undecodable", None)
                assert row["error"]
            else:
                assert (row["status"], row["caption"]) == ("ok", right_caption(image, prompt, size_px))
                assert (row["width"], row["height"]) == (24, 20)


def as_table(images: Mapping[str, bytes]) -> pa.Table:
    return pa.table({"key": list(images), "image": list(images.values())})
