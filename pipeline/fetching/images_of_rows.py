"""The images of a shard's rows, wherever its format has them: in the shard, or at an address."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from typing import NamedTuple

from pipeline.fetching.fetch_settings import FetchSettings
from pipeline.fetching.image_loader import ImageLoader
from pipeline.inputs.formats import read_shard
from pipeline.inputs.reader import ADDRESS, PROMPT, ReadOptions, ShardWork

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
