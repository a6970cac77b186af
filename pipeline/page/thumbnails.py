"""Thumbnails of output rows: small JPEG files, made from images that are read again from the input.

The input may have changed since the run. A row gets a thumbnail only if its image can still be read and
its bytes still have the SHA-256 digest that the row stores.
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from typing import Any

import pyarrow as pa
from PIL import Image

from blip2_actor import DecodePool
from pipeline.errors import InputError
from pipeline.fetching.images_of_rows import images_of_output
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
    wanted = [row for row in rows if row["width"] is not None][:number]
    if not wanted:
        return {}
    made, num_bytes = dict[RowAddress, bytes](), 0
    with closing(_thumbnails(run, wanted)) as thumbnails:
        for address, jpeg in thumbnails:
            num_bytes += len(jpeg)
            if num_bytes > MAX_IMAGE_BYTES:
                break
            made[address] = jpeg
    return made


def _thumbnails(
    run: Run, rows: Iterable[Mapping[str, Any]]
) -> Generator[tuple[RowAddress, bytes], None, None]:
    """Yield a JPEG file for each row whose image is still the one that the run has read."""
    settings = from_dict(CaptionSettings, run.settings).in_version(run.schema_version)
    options = replace(settings.read_options.images_only, table_rows=1)
    shards = {shard.name: shard for shard in run.shards}
    wanted: dict[str, dict[int, Mapping[str, Any]]] = defaultdict(dict)
    for row in rows:
        if row["shard"] in shards:
            wanted[row["shard"]][row["row"]] = row
    with DecodePool(SIZE_PX, settings.limits) as pool:
        for shard, by_number in wanted.items():
            numbers = sorted(by_number)
            in_order = [by_number[number] for number in numbers]
            images = images_of_output(shards[shard], numbers, in_order, options, settings.fetching)
            with closing(images), suppress(InputError, OSError, pa.ArrowException):
                for row, found in images:
                    if found.image is None:
                        continue
                    (decoded,) = pool.decode([found.image])
                    if decoded.pixels is not None:
                        jpeg = _jpeg(decoded.array(SIZE_PX), row["width"], row["height"])
                        yield (shard, row["row"]), jpeg


def _jpeg(pixels: Any, width: int, height: int) -> bytes:
    """Encode a square of pixels as a JPEG file with the proportions of the original image.

    Args:
        pixels: uint8[SIZE_PX, SIZE_PX, 3].
        width: width of the original image in pixels.
        height: height of the original image in pixels.
    """
    scale = SIZE_PX / max(width, height)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    file = io.BytesIO()
    Image.fromarray(pixels).resize(size).save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue()
