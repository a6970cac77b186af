"""List the shards of an input, once, before Ray starts.

The same input gives the same list. The names of the shards are the names of the output files, so they
are unique, and they are sorted.
"""

from __future__ import annotations

import heapq
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, takewhile
from typing import Any

from pipeline.errors import InputError
from pipeline.inputs.file_kinds import FORMATS, Chosen, Unread, choose_files
from pipeline.inputs.find_files import same_place
from pipeline.inputs.formats import count_rows
from pipeline.inputs.formats.manifests import manifest
from pipeline.inputs.formats.manifests.named_files import find_input
from pipeline.inputs.formats.tables import parquet
from pipeline.inputs.globs import Patterns
from pipeline.inputs.reader import ReadOptions
from pipeline.inputs.shards import Format, Shard, is_local, refuse_duplicates, refuse_unwritable
from pipeline.inputs.stamps import UNKNOWN, size_in, stamps_now
from pipeline.storage.file_table import FileTable
from pipeline.storage.filesystems import at_once, join

FILES_PER_SHARD = 1000
"""Images of a folder in one shard: about as many rows as a tar usually has."""
RANGE_BYTES = 256 << 20
"""Larger Parquet files are cut into ranges of row groups of about this size."""
MAX_STAMPED_IMAGES = 100_000
"""Maximum number of images in a local folder whose stamps are read: each takes up to milliseconds on a
network disk. In a larger folder, an image that is replaced under its own name is not noticed."""


@dataclass(frozen=True)
class ListedFiles:
    """The files of an input that are read."""

    chosen: dict[tuple[str, Format], FileTable]
    """Files by their root and format."""
    prefixes: dict[str, str]
    """Prefix of the names of the shards below each root."""
    folder_names: dict[str, str]
    """Name of a folder's slices, by root."""
    unread: Unread
    """The files of the input that are not read."""


@dataclass(frozen=True)
class Listing:
    """The shards of an input, and its files that are not read."""

    shards: list[Shard]
    """Sorted by name."""
    unread: Unread

    @property
    def notes(self) -> list[str]:
        """What a person must know of the input, in a sentence each."""
        num_images = sum(len(shard.files) for shard in self.shards if not shard.stamps)
        if not num_images:
            return self.unread.lines()
        return [
            *self.unread.lines(),
            f"a folder on a disk has {num_images:,} images, more than {MAX_STAMPED_IMAGES:,}: an image that "
            "is replaced under its own name before it is read is not noticed",
        ]


def list_shards(input_uri: str | Sequence[str], **options: Any) -> list[Shard]:
    """List the shards of an input as `list_input` does."""
    return list_input(input_uri, **options).shards


def list_input(
    input_uri: str | Sequence[str],
    *,
    format: str = "auto",
    limit: int | None = None,
    options: ReadOptions = ReadOptions(),
    patterns: Patterns = Patterns(),
) -> Listing:
    """List the shards of one or several inputs.

    Args:
        input_uri: files, folders, globs (`*`, `**`, `[ab]`; `?` in local paths only) and braces
            (`{00000..01023}.tar`, `{train,val}`). Each is a local path or a URI. `@FILE` is a manifest.
        format: "auto", or "webdataset", "parquet" or "folder" if the names of the files leave doubt.
        limit: maximum number of rows, taken from the shards in their order. Tars are scanned to count them.
        options: which members of a tar are rows, for the limit.
        patterns: which files are wanted.

    Raises:
        InputError: nothing is there, nothing in it can be read, or it could be read in two ways.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit must be at least 1, got {limit}")
    inputs = [input_uri] if isinstance(input_uri, str) else input_uri
    listed = list_files(inputs, format, patterns=patterns)
    shards = shards_of(listed, options=options)
    return Listing(shards if limit is None else list(take_rows(shards, limit, options)), listed.unread)


def list_files(
    inputs: Sequence[str],
    format: str,
    known: Collection[Shard] = (),
    patterns: Patterns = Patterns(),
    begun: Collection[str] = (),
) -> ListedFiles:
    """Find the files of one or several inputs, and choose those that are read.

    Args:
        inputs: as for `list_input`.
        format: as for `list_input`.
        known: the shards of an earlier listing.
        patterns: which files are wanted.
        begun: the inputs of a run, each as `same_place` writes it. Some of their files may be gone.

    Raises:
        InputError: as `list_input` does.
    """
    if not inputs:
        raise InputError("no input given; name a file, a folder or a pattern")
    if format not in ("auto", *FORMATS):
        raise InputError(f"format must be auto, {', '.join(FORMATS)}, got {format!r}")
    chosen: dict[tuple[str, Format], FileTable] = {}
    addresses: dict[str, tuple[str, ...]] = {}
    unread = Unread()
    for name in inputs:
        may_lack = bool(begun) and same_place(name, os.getcwd()) in begun
        for found, is_manifest in find_input(name, may_lack):
            addresses[found.root] = found.address
            choice = (
                Chosen({"manifest": found.files}, Unread())
                if is_manifest
                else choose_files(found, format, known, patterns, may_lack)
            )
            unread += choice.unread
            for file_format, files in choice.files.items():
                before = chosen.get((found.root, file_format))
                chosen[found.root, file_format] = files if before is None else before | files
    if begun and not any(chosen.values()):
        return list_files(inputs, format, known, patterns)  # raises, and says why
    prefixes = _prefixes(addresses)
    if len(addresses) > 1:
        names = [map(partial(_join_name, prefixes[root]), files) for (root, _), files in chosen.items()]
        refuse_duplicates(heapq.merge(*names))
    return ListedFiles(chosen, prefixes, _folder_names(chosen, prefixes, addresses), unread)


def _folder_names(
    chosen: Mapping[tuple[str, Format], FileTable],
    prefixes: Mapping[str, str],
    addresses: Mapping[str, tuple[str, ...]],
) -> dict[str, str]:
    """Return the name of each folder's slices, by root.

    Signed URLs of several images of a folder are several roots, of one image each, which names its slice.
    """
    num_roots = Counter(addresses.values())
    names = {}
    for root, address in addresses.items():
        names[root] = prefixes[root] or address[-1]
        if num_roots[address] > 1:
            names[root] = join(names[root], next(iter(chosen.get((root, "folder"), ())), ""))
    return names


def shards_of(
    listed: ListedFiles,
    num_before: Mapping[str, int] | None = None,
    options: ReadOptions = ReadOptions(),
) -> list[Shard]:
    """Make the shards of files, sorted by name.

    Args:
        listed: the files.
        num_before: for each name of a folder, the number of its images that are in shards already.
        options: which column of a table holds the images.
    """
    shards: list[Shard] = []
    for (root, file_format), files in listed.chosen.items():
        if file_format == "folder":
            name = listed.folder_names[root]
            shards += _folder_shards(root, name, files, (num_before or {}).get(name, 0))
        else:
            shards += _file_shards(root, listed.prefixes[root], file_format, files, options)
    shards.sort(key=lambda shard: shard.name)
    refuse_duplicates(shard.name for shard in shards)
    refuse_unwritable(shards)
    return shards


def shards_of_file(shard: Shard, options: ReadOptions) -> list[Shard]:
    """Return the shard of a whole tar or Parquet file, the ranges of a large table, or a manifest's parts."""
    if shard.format == "manifest":
        return manifest.split(shard)
    return parquet.split(shard, RANGE_BYTES, options) if shard.format == "parquet" else [shard]


def _prefixes(addresses: dict[str, tuple[str, ...]]) -> dict[str, str]:
    """Return for each root its path below the folder that all roots have in common."""
    columns = zip(*addresses.values(), strict=False)
    common = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
    return {root: "/".join(address[common:]) for root, address in addresses.items()}


def _join_name(prefix: str, file: str) -> str:
    return f"{prefix}/{file}" if prefix else file


def _file_shards(
    root: str, prefix: str, file_format: Format, files: FileTable, options: ReadOptions
) -> list[Shard]:
    """Make one shard of each tar or Parquet file, and several of a large Parquet file."""
    shards = []
    entries = list(files.entries())
    for (file, listed), stamp in zip(entries, stamps_now(root, entries), strict=True):
        size_bytes = listed.size_bytes
        if size_bytes is None and stamp != UNKNOWN:
            size_bytes = int(size_in(stamp))
        shards.append(
            Shard(
                name=_join_name(prefix, file),
                format=file_format,
                root=root,
                files=(file,),
                size_bytes=size_bytes,
                stamps=(stamp,),
            )
        )
    if file_format not in ("parquet", "manifest"):
        return shards
    return list(chain.from_iterable(at_once(lambda s: shards_of_file(s, options), shards)))


def _folder_shards(root: str, name: str, files: FileTable, num_before: int) -> Iterator[Shard]:
    """Yield slices of the sorted listing of a folder of images; they are numbered from `num_before` on."""
    width = len(str(num_before + len(files) - 1))
    has_stamps = not is_local(root) or len(files) <= MAX_STAMPED_IMAGES
    last = num_before - 1
    for paths, listed in files.slices(FILES_PER_SHARD):
        sizes = [file.size_bytes for file in listed]
        first, last = last + 1, last + len(paths)
        yield Shard(
            name=f"{name}~{first:0{width}}-{last:0{width}}",
            format="folder",
            root=root,
            files=paths,
            num_rows=len(paths),
            size_bytes=None if None in sizes else sum(filter(None, sizes)),
            stamps=stamps_now(root, list(zip(paths, listed, strict=True))) if has_stamps else (),
        )


def take_rows(shards: Iterable[Shard], limit: int, options: ReadOptions) -> Iterator[Shard]:
    """Yield the shards that hold the first `limit` rows; the last one is cut to what remains."""
    remaining = limit
    for shard in shards:
        num_rows = count_rows(shard, remaining, options)
        yield replace(shard, max_rows=remaining, num_rows=remaining) if num_rows == remaining else shard
        remaining -= num_rows
        if not remaining:
            return
