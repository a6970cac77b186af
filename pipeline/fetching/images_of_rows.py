"""The images of a shard's rows, wherever its format has them: in the shard, or at an address."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing

from pipeline.fetching.fetch_settings import FetchSettings
from pipeline.fetching.image_loader import ImageLoader
from pipeline.inputs.formats import read_shard
from pipeline.inputs.reader import ADDRESS, ReadOptions, ShardWork

RowImage = tuple[int, bytes | None, str | None]
"""Number of a row, its encoded image, and why there is none."""


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
            found = table.select(["row", "image", "error"])
            for address, batch in zip(addresses, found.to_batches(max_chunksize=1), strict=True):
                (row,) = batch.to_pylist()
                image, error = row["image"], row["error"]
                if address is not None:
                    image, _, error = next(loaded)
                yield row["row"], image, error
