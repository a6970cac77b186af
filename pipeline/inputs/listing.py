"""List the shards of an input, once, before Ray starts.

The same input gives the same list. The names of the shards are the names of the output files, so they
are unique, and they are sorted.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain, takewhile

from pipeline.errors import InputError
from pipeline.inputs.file_kinds import FORMATS, choose_files
from pipeline.inputs.find_files import FileSizes, find_files
from pipeline.inputs.formats import count_rows, parquet
from pipeline.inputs.shards import Format, Shard
from pipeline.storage.filesystems import MAX_CONCURRENT_REQUESTS

FILES_PER_SHARD = 1000
"""Images of a folder in one shard: about as many rows as a tar usually has."""
RANGE_BYTES = 256 << 20
"""Larger Parquet files are cut into ranges of row groups of about this size."""


def list_shards(
    input_uri: str | Sequence[str],
    *,
    format: str = "auto",
    limit: int | None = None,
    files_per_shard: int = FILES_PER_SHARD,
    range_bytes: int = RANGE_BYTES,
) -> list[Shard]:
    """List the shards of one or several inputs, sorted by name.

    Args:
        input_uri: files, folders, globs (`*`, `**`, `[ab]`; `?` in local paths only) and braces
            (`{00000..01023}.tar`, `{train,val}`). Each is a local path or a URI.
        format: "auto", or "webdataset", "parquet" or "folder" if the names of the files leave doubt.
        limit: maximum number of rows, taken from the shards in their order. Tars are scanned to count them.
        files_per_shard: images of a folder in one shard.
        range_bytes: Parquet files above this size are cut into ranges of about this size.

    Raises:
        InputError: nothing is there, nothing in it can be read, or it could be read in two ways.
    """
    inputs = [input_uri] if isinstance(input_uri, str) else list(input_uri)
    if not inputs:
        raise InputError("no input given; name a file, a folder or a pattern")
    if format not in ("auto", *FORMATS):
        raise InputError(f"format must be auto, {', '.join(FORMATS)}, got {format!r}")
    if limit is not None and limit < 1:
        raise InputError(f"limit must be at least 1, got {limit}")
    chosen: dict[tuple[str, Format], FileSizes] = {}
    addresses: dict[str, tuple[str, ...]] = {}
    for found in map(find_files, inputs):
        addresses[found.root] = found.address
        for file_format, files in choose_files(found, format).items():
            chosen.setdefault((found.root, file_format), {}).update(files)
    prefixes = _prefixes(addresses)
    if len(addresses) > 1:
        _refuse_duplicates(
            _join_name(prefixes[root], file) for (root, _), files in chosen.items() for file in files
        )
    shards: list[Shard] = []
    for (root, file_format), files in chosen.items():
        if file_format == "folder":
            shards += _folder_shards(root, prefixes[root] or addresses[root][-1], files, files_per_shard)
        else:
            shards += _file_shards(root, prefixes[root], file_format, files, range_bytes)
    _refuse_duplicates(shard.name for shard in shards)
    _refuse_unwritable(shards)
    shards.sort(key=lambda shard: shard.name)
    return shards if limit is None else list(_take_rows(shards, limit))


def _refuse_duplicates(names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise InputError(f"the inputs overlap: {name} occurs twice; name each file in one input only")
        seen.add(name)


def _refuse_unwritable(shards: Iterable[Shard]) -> None:
    for shard in shards:
        try:
            shard.name.encode()
        except UnicodeEncodeError:
            raise InputError(
                f"the file name {shard.name!a} is not valid UTF-8, so no output file can be named after it; "
                "rename the file"
            ) from None


def _prefixes(addresses: dict[str, tuple[str, ...]]) -> dict[str, str]:
    """Return for each root its path below the folder that all roots have in common."""
    columns = zip(*addresses.values(), strict=False)
    common = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
    return {root: "/".join(address[common:]) for root, address in addresses.items()}


def _join_name(prefix: str, file: str) -> str:
    return f"{prefix}/{file}" if prefix else file


def _file_shards(
    root: str, prefix: str, file_format: Format, files: FileSizes, range_bytes: int
) -> list[Shard]:
    """Make one shard of each tar or Parquet file, and several of a large Parquet file."""
    shards = []
    for file, size_bytes in files.items():
        if size_bytes is None and os.path.exists(os.path.join(root, file)):
            size_bytes = os.path.getsize(os.path.join(root, file))
        name = _join_name(prefix, file)
        shards.append(Shard(name=name, format=file_format, root=root, files=(file,), size_bytes=size_bytes))
    if file_format != "parquet":
        return shards
    with ThreadPoolExecutor(MAX_CONCURRENT_REQUESTS) as threads:
        parts = threads.map(lambda shard: parquet.split(shard, range_bytes), shards)
        return list(chain.from_iterable(parts))


def _folder_shards(root: str, name: str, files: FileSizes, files_per_shard: int) -> Iterator[Shard]:
    """Yield slices of the sorted listing of a folder of images."""
    paths = sorted(files)
    width = len(str(len(paths) - 1))
    for start in range(0, len(paths), files_per_shard):
        part = paths[start : start + files_per_shard]
        sizes = [files[path] for path in part]
        yield Shard(
            name=f"{name}~{start:0{width}}-{start + len(part) - 1:0{width}}",
            format="folder",
            root=root,
            files=tuple(part),
            num_rows=len(part),
            size_bytes=None if None in sizes else sum(filter(None, sizes)),
        )


def _take_rows(shards: Iterable[Shard], limit: int) -> Iterator[Shard]:
    """Yield the shards that hold the first `limit` rows; the last one is cut to what remains."""
    remaining = limit
    for shard in shards:
        num_rows = count_rows(shard, remaining)
        yield replace(shard, max_rows=remaining, num_rows=remaining) if num_rows == remaining else shard
        remaining -= num_rows
        if not remaining:
            return
