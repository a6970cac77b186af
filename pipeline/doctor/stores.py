"""Checks of an input and an output: what can be listed, read, written."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing, suppress

import pyarrow as pa

from blip2_actor import DecodePool
from pipeline.errors import InputError
from pipeline.fetching.fetch_settings import FetchSettings
from pipeline.fetching.images_of_rows import read_images
from pipeline.finding import Finding
from pipeline.inputs.formats import check_options
from pipeline.inputs.formats.tables.columns import Columns
from pipeline.inputs.formats.tables.parquet import schema_of
from pipeline.inputs.listing import list_shards
from pipeline.inputs.reader import ReadOptions, ShardWork
from pipeline.inputs.shards import Shard
from pipeline.ledger.layout import STATE
from pipeline.ledger.ledger import Ledger
from pipeline.progress import count
from pipeline.storage.folder import ASIDE, Folder

NUM_TRIED = 16
"""Rows of the first shard of which one must have an image that can be decoded."""
SIZE_PX = 32


def check_input(inputs: Sequence[str]) -> Finding:
    """List an input, and read and decode one of its first images."""
    try:
        shards = list_shards(inputs)
        if shards and (column := _addresses(shards[0])):
            found = f"{count(len(shards), 'shard')} without images, but {column} may hold their addresses"
            return Finding("input", "warn", found, "give --fetch to the job, which loads them from there")
        error = _first_error(shards[0]) if shards else "no file that is read"
    except (ValueError, OSError, pa.ArrowException) as raised:
        return _problem("input", raised, "give another --input, or the missing permission")
    if error is not None:
        return Finding("input", "fail", f"{count(len(shards), 'shard')}, but {error}", "look at these files")
    return Finding("input", "ok", f"{count(len(shards), 'shard')}, an image of the first one can be decoded")


def _addresses(shard: Shard) -> str | None:
    """Return the column of a table without images that may have addresses of them; they are not followed.

    Raises:
        InputError: the shard has neither.
    """
    try:
        check_options([shard], ReadOptions())
    except InputError:
        if shard.format == "parquet":
            with suppress(InputError):
                return Columns.find(schema_of(shard), ReadOptions(fetch=True)).image.name
        raise
    return None


def _first_error(shard: Shard) -> str | None:
    """Return why none of the first rows of a shard has a usable image, or None if one has."""
    first_error = f"{shard.uri} has no rows"
    work = ShardWork(shard=shard, missing=((0, NUM_TRIED),))
    images = read_images(work, ReadOptions(), FetchSettings())
    with closing(images), DecodePool(SIZE_PX) as pool:
        for number, found in enumerate(images):
            error = found.error or _decoding_error(pool, found.image)
            if error is None:
                return None
            if not number:
                first_error = f"the first rows of {shard.uri} have no usable image: {error}"
    return first_error


def _decoding_error(pool: DecodePool, image: bytes | None) -> str | None:
    if not image:
        return "there is no image"
    (decoded,) = pool.decode([image])
    return None if decoded.pixels is not None else decoded.error


def check_output(output: str) -> Finding:
    """Write, read and delete a small file, and say which run is there."""
    try:
        folder = Folder(output)
        folder.require_writable()
        for name in (ASIDE, STATE):
            folder.drop_if_empty(name)
        run = Ledger(folder).load()
    except (ValueError, OSError) as error:
        return _problem("output", error, "give another --output, or the missing permission")
    holds = "no run yet" if run is None else f"a run of {count(len(run.shards), 'shard')}"
    return Finding("output", "ok", f"{folder} can be written, and holds {holds}")


def _problem(subject: str, error: Exception, remedy: str) -> Finding:
    """Return the finding for an error; a ValueError of ours ends with a remedy of its own."""
    found, _, own = str(error).rpartition("; ") if isinstance(error, ValueError) else ("", "", "")
    return Finding(subject, "fail", found or str(error), own if found else remedy)
