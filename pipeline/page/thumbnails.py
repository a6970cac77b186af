"""Thumbnails of output rows: small JPEG files, made from images that are read again from the input.

The input may have changed since the run. A row gets a thumbnail only if its image can still be read and
its bytes still have the SHA-256 digest that the row stores.
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from operator import itemgetter
from typing import Any

import pyarrow as pa
from PIL import Image

from blip2_actor import DecodePool
from pipeline.errors import InputError
from pipeline.fetching.images_of_rows import RowImage, images_of_output
from pipeline.ledger.run_record import Run
from pipeline.page.render import MAX_IMAGE_BYTES
from pipeline.settings.from_dict import from_dict
from pipeline.settings.job_settings import CaptionSettings

SIZE_PX = 256
"""The longer side of a thumbnail."""
JPEG_QUALITY = 75

RowAddress = tuple[str, int]
"""Name of a shard, and number of a row in it."""


def thumbnails_of_run(run: Run, rows: Sequence[Mapping[str, Any]], number: int) -> dict[RowAddress, bytes]:
    """Return JPEG files for at most `number` rows of a run's output, and no more bytes than a page can hold.

    Args:
        rows: the rows that matter most first.
        number: 0 leaves the input alone.
    """
    shards = {shard.name: shard for shard in run.shards}
    wanted: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in [row for row in rows if row["width"] is not None and row["shard"] in shards][:number]:
        wanted[row["shard"]].append(row)
    if not wanted:
        return {}
    settings = from_dict(CaptionSettings, run.settings).in_version(run.schema_version)
    options = replace(settings.read_options.images_only, table_rows=1)
    made, num_bytes = dict[RowAddress, bytes](), 0
    with DecodePool(SIZE_PX, settings.limits) as pool:
        for shard, of_shard in wanted.items():
            of_shard.sort(key=itemgetter("row"))
            numbers = [row["row"] for row in of_shard]
            images = images_of_output(shards[shard], numbers, of_shard, options, settings.fetching)
            with closing(_as_far_as_readable(images)) as readable:
                for row, found in readable:
                    jpeg = _thumbnail(pool, found.image, row)
                    num_bytes += len(jpeg)
                    if num_bytes > MAX_IMAGE_BYTES:
                        return made
                    if jpeg:
                        made[shard, row["row"]] = jpeg
    return made


def _as_far_as_readable(
    images: Generator[tuple[Mapping[str, Any], RowImage], None, None],
) -> Generator[tuple[Mapping[str, Any], RowImage], None, None]:
    """Stop where the input cannot be read."""
    with closing(images), suppress(InputError, OSError, pa.ArrowException):
        yield from images


def _thumbnail(pool: DecodePool, image: bytes | None, row: Mapping[str, Any]) -> bytes:
    """Return a JPEG file with the proportions of the original image; empty if it cannot be decoded."""
    (decoded,) = pool.decode([image])
    if decoded.pixels is None:
        return b""
    scale = SIZE_PX / max(row["width"], row["height"])
    size = (max(1, round(row["width"] * scale)), max(1, round(row["height"] * scale)))
    file = io.BytesIO()
    Image.fromarray(decoded.array(SIZE_PX)).resize(size).save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue()
