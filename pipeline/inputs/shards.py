"""A shard: the unit of input, of retry and of output.

JSON can store a shard: `Shard(**json.loads(shard.to_json()))` is the same shard. A stored shard holds no
secrets; `with_secrets` puts those of the user's inputs back.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from pipeline.errors import InputError
from pipeline.storage.packed_texts import PackedTexts
from pipeline.storage.secrets import with_secrets_of, without_secrets

PACKED_FROM = 100
"""Number of paths from which on they are packed; fewer need little memory."""

Format = Literal["webdataset", "parquet", "folder", "manifest"]


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A tar, a Parquet file or a range of its row groups, a slice of a folder's sorted listing, or a part of
    a manifest."""

    name: str
    """Path relative to the input's root, unique in a run. A part of a file or folder ends in
    `~<first row>-<last row>`. The name is the value of the `shard` column, and the output file's name
    without `.parquet`."""
    format: Format
    root: str
    """URI of the folder that holds the files, as `open_filesystem` takes it."""
    files: Sequence[str]
    """Paths below `root`: one per row for a folder, else one. Many are packed."""
    row_groups: tuple[int, int] | None = None
    """Half-open range of the Parquet file's row groups; None means all of them."""
    span: tuple[int, int] | None = None
    """Half-open range of the manifest's bytes; None means all of them."""
    num_rows: int | None = None
    """Number of rows if the listing knows it. For most shards it is known only after reading."""
    max_rows: int | None = None
    """Rows from this number on do not belong to the shard (`--limit`)."""
    size_bytes: int | None = None
    """Bytes to be read, if the listing knows them."""
    stamps: Sequence[str] = ()
    """For each file a string that changes with its content; see `pipeline.inputs.stamps`. Empty if they are
    not known, as in runs of version 0.1.0."""
    generation: int = 0
    """How often the shard was begun again because its files had changed."""

    def __post_init__(self) -> None:
        for name in ("files", "stamps"):
            texts = getattr(self, name)
            if not isinstance(texts, PackedTexts) or len(texts) < PACKED_FROM:
                kept = PackedTexts(texts) if len(texts) >= PACKED_FROM else tuple(texts)
                object.__setattr__(self, name, kept)
        for name in ("row_groups", "span"):
            if getattr(self, name) is not None:
                first, stop = getattr(self, name)
                object.__setattr__(self, name, (first, stop))

    @property
    def file_name(self) -> str:
        """The name that the shard of its whole file would have."""
        is_part = self.row_groups is not None or self.span is not None
        return self.name.rpartition("~")[0] if is_part else self.name

    @property
    def uri(self) -> str:
        """What is read, for messages: the file, or the folder of a slice. It holds no secrets."""
        root = without_secrets(self.root)
        return root if self.format == "folder" else f"{root.rstrip('/')}/{self.files[0]}"

    def to_json(self) -> str:
        """Return a line that stores the shard."""
        return json.dumps(vars(self), default=list)

    def limit_rows(self, num_rows: int) -> int:
        """Return how many of the `num_rows` rows of its files belong to the shard."""
        return num_rows if self.max_rows is None else min(num_rows, self.max_rows)


_RESERVED = re.compile(r"^_blip2/|~again\d+$")
"""Names that `pipeline.ledger.layout` uses for files of the state and for shards that were begun again."""
_SLICE = re.compile(r"(\d+)/(\d+)")


@dataclass(frozen=True)
class RunSlice:
    """One of the parts into which several drivers divide the shards of a run (`--slice 2/8`)."""

    number: int
    """From 1 to `total`."""
    total: int

    @classmethod
    def parse(cls, text: str) -> RunSlice:
        """Return the slice that a text such as "2/8" names.

        Raises:
            ValueError: the text does not name one.
        """
        match = _SLICE.fullmatch(text)
        number, total = (int(match[1]), int(match[2])) if match else (0, 0)
        if not 1 <= number <= total:
            raise ValueError(f"slice must be I/N with I from 1 to N, such as 2/8, got {text}")
        return cls(number, total)

    def has(self, shard: str) -> bool:
        """Return whether a shard is in the slice; this depends on its name alone."""
        digest = hashlib.sha256(shard.encode()).digest()
        return int.from_bytes(digest[:8]) % self.total == self.number - 1

    def __str__(self) -> str:
        return f"{self.number}/{self.total}"


def with_secrets(shards: Iterable[Shard], inputs: Sequence[str]) -> Iterator[Shard]:
    """Give shards that were stored without secrets those of the input that names their file or its folder.

    Args:
        shards: their roots hold no secrets.
        inputs: the inputs as the user named them.
    """
    inputs = [name.removeprefix("@") for name in inputs]
    secret = {plain: uri for uri in inputs if (plain := without_secrets(uri).rstrip("/")) != uri.rstrip("/")}
    for shard in shards:
        root = shard.root.rstrip("/")
        of_file = secret.get(f"{root}/{shard.files[0]}") if secret else None
        of_folder = next((uri for plain, uri in secret.items() if f"{plain}/".startswith(f"{root}/")), None)
        given = of_file or of_folder
        yield shard if given is None else replace(shard, root=with_secrets_of(given, shard.root))


def is_local(root: str) -> bool:
    """Return whether the stamps of the files below a root are read one by one."""
    return "://" not in root


def refuse_duplicates(names: Iterable[str]) -> None:
    """Raise InputError if a name occurs twice.

    Args:
        names: sorted, because a set of 10^8 names would not fit into memory.
    """
    for name, following in pairwise(names):
        if name == following:
            raise InputError(f"the inputs overlap: {name} occurs twice; name each file in one input only")


def refuse_unwritable(shards: Iterable[Shard]) -> None:
    """Raise InputError if the name of a shard cannot be that of an output file."""
    for shard in shards:
        try:
            shard.name.encode()
        except UnicodeEncodeError:
            raise InputError(
                f"the file name {shard.name!a} is not valid UTF-8, so no output file can be named after it; "
                "rename the file"
            ) from None
        if _RESERVED.search(shard.name):
            raise InputError(
                f"the file {shard.name} must not be in a folder _blip2, nor may its name end in ~again and a "
                "number: the output has such names for its own files; rename the file or its folder"
            )
