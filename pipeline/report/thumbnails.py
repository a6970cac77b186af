"""Small pictures of rows, read once more from the input, which may have gone since."""

from __future__ import annotations

import hashlib
import io
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from typing import Any

import pyarrow as pa
from PIL import Image

from blip2_actor import DecodePool, ImageLimits
from pipeline.formats import read_shard
from pipeline.inputs.reader import ReadOptions, ShardWork
from pipeline.inputs.shards import InputError, Shard

SIZE_PX = 192
"""The longer side."""
JPEG_QUALITY = 80

Place = tuple[str, int]
"""Shard and row."""


def thumbnails(
    rows: Iterable[Mapping[str, Any]],
    shards: Mapping[str, Shard],
    options: ReadOptions,
    limits: ImageLimits,
) -> dict[Place, bytes]:
    """JPEGs of the rows whose image is still there and is still the one that was captioned.

    Args:
        rows: of the output.
        options: which column or member of the input is the image.
    """
    wanted: dict[str, dict[int, Mapping[str, Any]]] = defaultdict(dict)
    for row in rows:
        if row["width"] is not None and row["shard"] in shards:
            wanted[row["shard"]][row["row"]] = row
    found = {}
    with DecodePool(SIZE_PX, limits) as pool:
        for shard, of_shard in wanted.items():
            for number, image in _images(shards[shard], sorted(of_shard), options):
                row = of_shard[number]
                if image is None or hashlib.sha256(image).digest() != row["sha256"]:
                    continue
                (decoded,) = pool.decode([image])
                if decoded.pixels is not None:
                    found[shard, number] = _jpeg(decoded.array(SIZE_PX), row["width"], row["height"])
    return found


def _images(shard: Shard, rows: list[int], options: ReadOptions) -> Iterator[tuple[int, bytes | None]]:
    """The encoded images of some rows; reading ends with the last of them, or where the input fails."""
    work = ShardWork(shard=shard, missing=tuple((row, row + 1) for row in rows))
    with closing(read_shard(work, options)) as reader:
        try:
            for table in reader:
                for number, image in zip(table["row"].to_pylist(), table["image"].to_pylist(), strict=True):
                    yield number, image.get("bytes") if isinstance(image, dict) else image
                    if number == rows[-1]:
                        return
        except (InputError, OSError, pa.ArrowException):
            return


def _jpeg(pixels: Any, width: int, height: int) -> bytes:
    """The square of pixels in the picture's own proportions."""
    scale = SIZE_PX / max(width, height)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    file = io.BytesIO()
    Image.fromarray(pixels).resize(size).save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue()
