"""What is asked of a reader and what it gives: options, work, report, and the columns of its tables.

A reader numbers the rows of the whole shard from 0, skips those that are not asked for, and gives
small Arrow tables in order. The same work gives the same tables every time.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.inputs.shards import Shard

if TYPE_CHECKING:
    import pyarrow as pa

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tiff", "tif")
"""File names that end so, in any case, are images; their content is not looked at here."""

READ_COLUMNS = {
    "key": "string",
    "shard": "string",
    "row": "int64",
    "image": "binary",  # encoded bytes as they came; null when there are none
    "status": "string",  # a blip2_actor.Status when reading already settled the row, else null
    "error": "string",  # one sentence when status is not null
}
"""First columns of every table; then those of `ReadOptions.texts` (string), then the kept ones."""

PROMPT = "prompt"
TEXT = "_blip2_text_"
"""Begins the names of columns with text that is scored."""

Tables = Generator["pa.Table", None, "ShardReport"]
"""A reader: tables to iterate over, and the report as the generator's return value."""


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """Which columns of a table, or members of a tar's samples, are read."""

    image_column: str | None = None
    """Column with the image, or the extension of the image member (`jpg`, `left.png`); None finds it."""
    key_column: str | None = None
    """Parquet column with each row's key; None takes `__key__` or `key`, else the row number in the file."""
    prompt_column: str | None = None
    """Column, or extension of the member, with each row's own prompt."""
    text_columns: tuple[str, ...] = ()
    """Columns, or members by extension, whose text is scored."""
    keep: tuple[str, ...] = ()
    """Columns, or members by extension, carried to the output; `new=old` renames one on the way."""
    max_image_bytes: int = 128 << 20
    """A larger image file is not read; its row gets the status `too_large`."""
    table_rows: int = 512
    """Most rows of one table."""
    table_bytes: int = 16 << 20
    """A table ends once it holds so many bytes of images."""

    def __post_init__(self) -> None:
        for name in ("text_columns", "keep"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("max_image_bytes", "table_rows", "table_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        names = list(self.kept)
        taken = sorted({*READ_COLUMNS, PROMPT}.intersection(names))
        if taken:
            raise ValueError(
                f"keep must not use the name {taken[0]!r}, which every output has itself; "
                f"rename it on the way: --keep my_{taken[0]}={taken[0]}"
            )
        if len(names) < len(self.keep):
            raise ValueError(f"keep must name each column once, got {', '.join(self.keep)}")

    @property
    def texts(self) -> dict[str, str]:
        """Columns of text between the stages, to their names in the input: the prompt, what is scored."""
        prompt = {} if self.prompt_column is None else {PROMPT: self.prompt_column}
        return prompt | {TEXT + name: name for name in self.text_columns}

    @property
    def kept(self) -> dict[str, str]:
        """Name in the output to name in the input, in the order asked for."""
        pairs = (entry.partition("=") for entry in self.keep)
        return {new: old or new for new, _, old in pairs}


@dataclass(frozen=True, kw_only=True)
class ShardWork:
    """One shard and the rows of it that are still to do."""

    shard: Shard
    missing: tuple[tuple[int, int | None], ...] | None = None
    """Sorted half-open row ranges; the last may stop at None, the unknown end. None is every row."""

    def wants(self, row: int) -> bool:
        if self.missing is None:
            return True
        at = bisect_right(self.missing, row, key=lambda wanted: wanted[0]) - 1
        if at < 0:
            return False
        stop = self.missing[at][1]
        return stop is None or row < stop

    def overlaps(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yield the parts of the rows from start (included) to stop (excluded) that are to do."""
        for first, end in ((0, None),) if self.missing is None else self.missing:
            low, high = max(first, start), stop if end is None else min(end, stop)
            if low < high:
                yield low, high


@dataclass(frozen=True, kw_only=True)
class ShardReport:
    """How reading a shard ended."""

    shard: str
    num_rows: int
    """Rows of the shard as far as it could be read, those that were not asked for included."""
    complete: bool
    """False when the shard holds, or may hold, something that could not be read."""
    reason: str | None = None
    """One sentence when not complete."""
