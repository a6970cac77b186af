"""A shard: the unit of input, of retry and of output. Plain values that JSON can hold, stdlib only.

`json.dumps(dataclasses.asdict(shard))` stores one, `Shard(**json.loads(text))` gives it back.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

Format = Literal["webdataset", "parquet", "folder"]

_CREDENTIALS = re.compile(r"(?<=://)[^/@:]*:[^/@]*@")


class InputError(ValueError):
    """The input cannot be used as it was named; the message says what to do about it."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A tar, a Parquet file or a range of its row groups, or a slice of a folder's sorted listing."""

    name: str
    """Path relative to the input's root, unique in a run; a part of a file or folder ends in
    `~<first row>-<last row>`. It is the `shard` column, and the output file's name less `.parquet`."""
    format: Format
    root: str
    """URI of the folder the files stand in, as `storage.open_filesystem` takes it."""
    files: tuple[str, ...]
    """Paths below `root`: one for a tar or a Parquet file, one per row for a folder."""
    row_groups: tuple[int, int] | None = None
    """Half-open range of the Parquet file's row groups; None is all of them."""
    num_rows: int | None = None
    """Rows, where the listing knows them; most are known only when the shard has been read."""
    max_rows: int | None = None
    """Rows from this number on do not belong to the shard (`--limit`)."""
    size_bytes: int | None = None
    """Bytes to be read, where the listing knows them."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "files", tuple(self.files))
        if self.row_groups is not None:
            first, stop = self.row_groups
            object.__setattr__(self, "row_groups", (first, stop))

    @property
    def uri(self) -> str:
        """What is read, for people: the file, or the folder of a slice."""
        root = without_secrets(self.root)
        return root if self.format == "folder" else f"{root.rstrip('/')}/{self.files[0]}"

    def rows_of(self, num_rows: int) -> int:
        """How many of so many rows belong to the shard."""
        return num_rows if self.max_rows is None else min(num_rows, self.max_rows)


def without_secrets(uri: str) -> str:
    """A URI less its options and what stands before its bucket, either of which may hold a password."""
    return _CREDENTIALS.sub("", uri.partition("?")[0]) if "://" in uri else uri


def with_secrets(shard: Shard, inputs: Sequence[str]) -> Shard:
    """A shard that was kept without secrets, with those of the input that it stands below."""
    for uri in inputs:
        plain = without_secrets(uri)
        if plain != uri and plain.startswith(shard.root.rstrip("/")):
            credentials = _CREDENTIALS.search(uri)
            scheme, _, path = shard.root.partition("://")
            _, mark, options = uri.partition("?")
            root = f"{scheme}://{credentials.group() if credentials else ''}{path}{mark}{options}"
            return replace(shard, root=root)
    return shard
