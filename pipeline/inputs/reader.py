"""The contract of a reader: its options, what it returns, and the columns of its tables.

A reader numbers the rows of the whole shard from 0, skips the rows that it is not asked for, and yields
small Arrow tables in order. Its generator's return value is a report. The same work gives the same
tables every time, so that Ray can run a lost read again.

This module does not import pyarrow, because the command line is built from these options.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from blip2_actor.inputs.field_types import require_types
from pipeline.column_names import SCHEMA_VERSION
from pipeline.inputs.shards import Shard

if TYPE_CHECKING:
    import pyarrow as pa

READ_COLUMNS = {
    "key": "string",
    "shard": "string",
    "row": "int64",
    "image": "binary",  # encoded bytes as they were read; null if there are none
    "status": "string",  # a blip2_actor.Status if the row has already failed, else null
    "error": "string",  # one sentence if status is not null
    "member": "string",  # name of the image's member in a tar, or its place in a list; null if it has none
}
"""The first columns of every table, with their Arrow types. The columns of `ReadOptions.texts`, which are
strings, and the kept columns follow."""

MEMBER = "member"
ADDRESS = "_blip2_address"
"""Column with the address of an image that is not in the shard; null if the row has its image or has failed.
It follows the first columns of a table, in shards that name images by their addresses."""
PROMPT = "prompt"
TEXT = "_blip2_text_"
"""Prefix of the names of columns with text that is scored."""

Tables = Generator["pa.Table", None, "ShardReport"]
"""A reader: tables to iterate over, and the report as the generator's return value."""


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """Which columns of a table, or members of a tar's samples, are read."""

    image_column: str | None = None
    """Column with the image, or extension of the image member (`jpg`, `left.png`); found if not given."""
    fetch: bool = False
    """The image column of tables, or the image member of tars, holds the address of an image: an http(s) URL,
    a URI such as s3://bucket/key, or a path, relative to the folder of the table."""
    image_encoding: Literal["auto", "base64"] = "auto"
    """How a table writes its images: auto finds encoded bytes and base64; base64 if auto does not see it."""
    key_column: str | None = None
    """Parquet column with each row's key; default: `__key__` or `key`, else the row's number in the file."""
    prompt_column: str | None = None
    """Column, or extension of the member, with each row's own prompt."""
    text_columns: tuple[str, ...] = ()
    """Columns, or members by extension, whose text is scored."""
    keep: tuple[str, ...] = ()
    """Columns, or members by extension, to copy to the output; `new=old` renames one."""
    max_image_bytes: int = 128 << 20
    """A larger image file is not read, and its row gets the status `too_large`."""
    table_rows: int = 512
    """Maximum number of rows in one table."""
    table_bytes: int = 16 << 20
    """A table ends as soon as its values have about this many bytes."""
    schema_version: int = SCHEMA_VERSION
    """Version of the row contract that the rows follow: that of the run."""

    def __post_init__(self) -> None:
        require_types(self)
        for name in ("max_image_bytes", "table_rows", "table_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.fetch and self.image_encoding != "auto":
            raise ValueError("image_encoding must be left out with fetch, got base64; an address is no image")
        names = list(self.kept)
        taken = sorted({*READ_COLUMNS, PROMPT}.intersection(names))
        if taken:
            raise ValueError(
                f"keep must not use the name {taken[0]!r}, which is a column of every output; "
                f"rename the column: --keep my_{taken[0]}={taken[0]}"
            )
        if len(names) < len(self.keep):
            raise ValueError(f"keep must name each column once, got {', '.join(self.keep)}")

    @property
    def images_only(self) -> ReadOptions:
        """The same options without texts and kept columns."""
        return replace(self, prompt_column=None, text_columns=(), keep=())

    @property
    def columns(self) -> dict[str, str]:
        """The first columns of every table, as `READ_COLUMNS`; version 1 has no `member`.

        If images are named by their addresses, these follow.
        """
        columns = {
            name: kind for name, kind in READ_COLUMNS.items() if self.schema_version > 1 or name != MEMBER
        }
        return columns | ({ADDRESS: "string"} if self.fetch else {})

    @property
    def texts(self) -> dict[str, str]:
        """The text columns that readers add, prompt and scored texts, mapped to their names in the input."""
        prompt = {} if self.prompt_column is None else {PROMPT: self.prompt_column}
        return prompt | {TEXT + name: name for name in self.text_columns}

    @property
    def kept(self) -> dict[str, str]:
        """The kept columns in the given order: name in the output mapped to name in the input."""
        pairs = (entry.partition("=") for entry in self.keep)
        return {new: old or new for new, _, old in pairs}


@dataclass(frozen=True, kw_only=True)
class ShardWork:
    """One shard, and which of its rows are still to be read."""

    shard: Shard
    missing: tuple[tuple[int, int | None], ...] = ((0, None),)
    """Sorted half-open ranges of rows; None as the last stop is the unknown end."""

    def wants(self, row: int) -> bool:
        """Whether a row is to be read."""
        index = bisect_right(self.missing, row, key=lambda rows: rows[0]) - 1
        if index < 0:
            return False
        stop = self.missing[index][1]
        return stop is None or row < stop

    def overlaps(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yield the ranges of rows to be read that lie from start (included) to stop (excluded)."""
        for first, end in self.missing:
            low, high = max(first, start), stop if end is None else min(end, stop)
            if low < high:
                yield low, high


@dataclass(frozen=True, kw_only=True)
class ShardReport:
    """How reading a shard ended."""

    shard: str
    num_rows: int
    """Rows of the shard as far as it could be read, including those that were not asked for."""
    complete: bool
    """False if the shard holds, or may hold, rows that could not be read."""
    reason: str | None = None
    """One sentence if `complete` is False."""
    changed: bool = False
    """Whether the input differed from the run's list before or after reading; its rows are then not used."""
    generation: int = 0
    """Generation of the shard; see `Shard.generation`."""
    content: str | None = None
    """Digest of a sample of the file's bytes (`pipeline.inputs.stamps`), if the shard is one file."""
    note: str | None = None
    """What a person must know about rows that are otherwise complete, such as a kept column that is null."""

    def replaces(self, known: ShardReport | None) -> bool:
        """Return whether this report counts from now on, after the shard was read again.

        A report with fewer rows does not replace one with more: rows that were read once count, unless the
        input has changed.
        """
        if known is None or self.complete or self.changed:
            return True
        return not known.complete and known.num_rows <= self.num_rows
