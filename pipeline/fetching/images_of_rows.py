"""The images of a shard's rows, wherever its format has them: in the shard, or at an address."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterable, Mapping
from contextlib import closing
from typing import Any, NamedTuple

from pipeline.fetching.fetch_settings import FetchSettings
from pipeline.fetching.image_loader import ImageLoader
from pipeline.inputs.formats import read_shard
from pipeline.inputs.reader import ADDRESS, PROMPT, ReadOptions, ShardWork
from pipeline.inputs.shards import Shard
from pipeline.rowset import RowSet, ranges_of

READ = ("row", "image", "error", PROMPT)


class RowImage(NamedTuple):
    """The image of a row."""

    row: int
    """Number of the row in its shard."""
    image: bytes | None
    """The encoded image."""
    error: str | None
    """Why there is no image."""
    prompt: str | None
    """The row's own prompt, if the options name a column of prompts."""


def read_images(
    work: ShardWork, options: ReadOptions, settings: FetchSettings
) -> Generator[RowImage, None, None]:
    """Yield the images of the rows asked for, in order.

    Args:
        work: a shard, and which of its rows are wanted.
        options: which column or member is the image.
        settings: how images are fetched that the shard names by their address.
    """
    with (
        closing(read_shard(work, options)) as tables,
        closing(ImageLoader(settings, options.max_image_bytes)) as loader,
    ):
        for table in tables:
            addresses = table[ADDRESS].to_pylist() if ADDRESS in table.column_names else [None] * len(table)
            loaded = loader.load(address for address in addresses if address is not None)
            found = table.select([name for name in READ if name in table.column_names])
            for address, batch in zip(addresses, found.to_batches(max_chunksize=1), strict=True):
                (row,) = batch.to_pylist()
                image, error = row["image"], row["error"]
                if address is not None:
                    image, _, error = next(loaded)
                yield RowImage(row["row"], image, error, row.get(PROMPT))


def images_of_output(
    shard: Shard,
    numbers: Iterable[int],
    rows: Iterable[Mapping[str, Any]],
    options: ReadOptions,
    settings: FetchSettings,
) -> Generator[tuple[Mapping[str, Any], RowImage], None, None]:
    """Yield rows of an output, each with its image, which is read again from the input.

    The input may have changed since the run: an image without the SHA-256 digest that its row stores is left
    out, and the error says so. A row that comes twice has its image twice; one that comes after a row with a
    larger number has none, because the input is read once.

    Args:
        shard: the shard of the rows.
        numbers: the numbers of the rows, in the order of the rows.
        rows: the rows; each has its image if their numbers ascend.
        options: which column or member is the image.
        settings: how images are fetched that the shard names by their address.

    Raises:
        InputError, OSError, pa.ArrowException: the input cannot be read.
    """
    work = ShardWork(shard=shard, missing=tuple(RowSet(ranges_of(numbers))))
    image: RowImage | None = None
    with closing(read_images(work, options, settings)) as images:
        for row in rows:
            number = row["row"]
            while (image is None or image.row < number) and (following := next(images, None)):
                image = following
            if image is not None and image.row == number:
                found = image
            elif image is not None and image.row > number:
                found = RowImage(number, None, f"its row comes after row {image.row} in the output", None)
            else:
                found = RowImage(number, None, "the input ends before it", None)
            if found.image is None:
                found = found._replace(error=f"the image can no longer be read: {found.error}")
            elif hashlib.sha256(found.image).digest() != row["sha256"]:
                found = found._replace(image=None, error="the image is another one than in the run")
            yield row, found
