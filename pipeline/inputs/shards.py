"""A shard: the unit of input, of retry and of output.

A shard holds plain values that JSON can store, and this module needs only the standard library.
`json.dumps(dataclasses.asdict(shard))` stores a shard, `Shard(**json.loads(text))` restores it.

A shard that is stored or shown must hold no password. `without_secrets` removes the secrets of a URI;
`with_secrets` puts those of the user's inputs back.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

Format = Literal["webdataset", "parquet", "folder"]

_CREDENTIALS = re.compile(r"(?<=://)[^/@:]*:[^/@]*@")


class InputError(ValueError):
    """The input cannot be used as the user named it. The message says what to do about it."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A tar, a Parquet file or a range of its row groups, or a slice of a folder's sorted listing."""

    name: str
    """Path relative to the input's root, unique in a run. A part of a file or folder ends in
    `~<first row>-<last row>`. The name is the value of the `shard` column, and the output file's name
    without `.parquet`."""
    format: Format
    root: str
    """URI of the folder that holds the files, as `open_filesystem` takes it."""
    files: tuple[str, ...]
    """Paths below `root`: one for a tar or a Parquet file, one per row for a folder."""
    row_groups: tuple[int, int] | None = None
    """Half-open range of the Parquet file's row groups; None means all of them."""
    num_rows: int | None = None
    """Number of rows if the listing knows it. For most shards it is known only after reading."""
    max_rows: int | None = None
    """Rows from this number on do not belong to the shard (`--limit`)."""
    size_bytes: int | None = None
    """Bytes to be read, if the listing knows them."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "files", tuple(self.files))
        if self.row_groups is not None:
            first, stop = self.row_groups
            object.__setattr__(self, "row_groups", (first, stop))

    @property
    def uri(self) -> str:
        """What is read, for messages: the file, or the folder of a slice. It holds no secrets."""
        root = without_secrets(self.root)
        return root if self.format == "folder" else f"{root.rstrip('/')}/{self.files[0]}"

    def limit_rows(self, num_rows: int) -> int:
        """Return how many of the `num_rows` rows of its files belong to the shard."""
        return num_rows if self.max_rows is None else min(num_rows, self.max_rows)


def without_secrets(uri: str) -> str:
    """Remove the options of a URI and the credentials before its bucket: both may hold a password."""
    return _CREDENTIALS.sub("", uri.partition("?")[0]) if "://" in uri else uri


def with_secrets(shard: Shard, inputs: Sequence[str]) -> Shard:
    """Give a shard that was stored without secrets those of the input that it lies below.

    Args:
        shard: a shard whose root holds no secrets.
        inputs: the inputs as the user named them.
    """
    for uri in inputs:
        plain = without_secrets(uri)
        if plain != uri and plain.startswith(shard.root.rstrip("/")):
            credentials = _CREDENTIALS.search(uri)
            scheme, _, path = shard.root.partition("://")
            _, mark, options = uri.partition("?")
            root = f"{scheme}://{credentials.group() if credentials else ''}{path}{mark}{options}"
            return replace(shard, root=root)
    return shard
