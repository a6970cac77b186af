"""A sample of an output's ok rows, each with its image, which is read again from the input."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from blip2_actor import Status
from pipeline.caption_counts import REGENERATED
from pipeline.errors import InputError
from pipeline.fetching.images_of_rows import images_of_output
from pipeline.inputs.evenly_spaced import evenly_spaced
from pipeline.inputs.reader import ReadOptions
from pipeline.inputs.shards import Shard
from pipeline.ledger.commit import Summary
from pipeline.ledger.run_record import Run
from pipeline.report.rows import tables_of
from pipeline.settings.from_dict import from_dict
from pipeline.settings.job_settings import CaptionSettings
from pipeline.storage.folder import Folder

COLUMNS = ("key", "row", "status", "flags", "caption", "captions", "num_tokens", "finish_reason", "sha256")


@dataclass(frozen=True)
class SampledRow:
    """One row with what it was made from."""

    name: str
    """For people: shard, number and key."""
    columns: Mapping[str, Any]
    image: bytes | None = None
    """The encoded image; None if it is no longer there."""
    prompt: str | None = None
    problem: str | None = None
    """Why there is no image."""


def sample_rows(
    folder: Folder, run: Run, summaries: Mapping[str, Summary], size: int
) -> Iterator[SampledRow]:
    """Yield ok rows at equal distances over the finished shards.

    Args:
        summaries: what the footers of the finished shards say, by shard.
        size: maximum number of rows. Rows that were made with other options do not count.
    """
    settings = from_dict(CaptionSettings, run.settings).in_version(run.schema_version)
    options = dataclasses.replace(settings.read_options, keep=(), text_columns=(), table_rows=1)
    num_ok = [
        (shard, summaries[shard.name].by_status.get(Status.OK.value, 0))
        for shard in run.shards
        if shard.name in summaries
    ]
    chosen = evenly_spaced(range(sum(number for _, number in num_ok)), size)
    start = 0
    for shard, number in num_ok:
        positions = [position - start for position in chosen if start <= position < start + number]
        start += number
        if positions:
            rows = [row for row in _ok_rows(folder, shard, positions) if REGENERATED not in row["flags"]]
            yield from _with_images(shard, rows, options, settings)


def _ok_rows(folder: Folder, shard: Shard, positions: list[int]) -> Iterator[dict[str, Any]]:
    """Yield the ok rows of a shard at some positions, counted among its ok rows."""
    start = 0
    for table in tables_of(folder, shard.name, COLUMNS):
        table = table.filter(pc.equal(table["status"], Status.OK.value))
        here = [position - start for position in positions if start <= position < start + len(table)]
        yield from table.take(here).to_pylist()
        start += len(table)
        if start > positions[-1]:
            return


def _with_images(
    shard: Shard, rows: list[dict[str, Any]], options: ReadOptions, settings: CaptionSettings
) -> Iterator[SampledRow]:
    rows = sorted(rows, key=itemgetter("row"))
    names = [f"{shard.name} row {row['row']} ({row['key']})" for row in rows]
    images = images_of_output(shard, [row["row"] for row in rows], rows, options, settings.fetching)
    num_read = 0
    try:
        with closing(images):
            for row, found in images:
                prompt = settings.prompt if options.prompt_column is None else found.prompt
                num_read += 1
                yield SampledRow(names[num_read - 1], row, found.image, prompt, found.error)
    except (InputError, OSError, pa.ArrowException) as error:
        for name, row in zip(names[num_read:], rows[num_read:], strict=True):
            yield SampledRow(name, row, problem=f"its image cannot be read: {error}")
