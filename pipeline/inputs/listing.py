"""From what the user names as input to a sorted list of shards, once, before Ray starts."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain, takewhile

from pipeline.formats import count_rows, parquet
from pipeline.inputs.file_kinds import FORMATS, choose_files
from pipeline.inputs.find_files import Sizes, find_files
from pipeline.inputs.shards import Format, InputError, Shard

__all__ = ["InputError", "list_shards"]

FILES_PER_SHARD = 1000
"""Images of a folder that make one shard: as many rows as a usual tar has."""
RANGE_BYTES = 256 << 20
"""Larger Parquet files are cut into ranges of row groups of about this size."""
FOOTERS_AT_ONCE = 16
"""Parquet files whose row groups are looked up at the same time."""


def list_shards(
    input_uri: str | Sequence[str],
    *,
    format: str = "auto",
    limit: int | None = None,
    files_per_shard: int = FILES_PER_SHARD,
    range_bytes: int = RANGE_BYTES,
) -> list[Shard]:
    """The shards of one or several inputs, sorted by name; the same input gives the same list.

    Args:
        input_uri: files, folders, globs (`*`, `**`, `[ab]`; `?` in local paths only) and braces
            (`{00000..01023}.tar`, `{train,val}`), each local or a URI.
        format: "auto", or "webdataset", "parquet" or "folder" to settle doubt.
        limit: only the first so many rows, over the shards in their order; tars are walked to count them.
        files_per_shard: images of a folder that make one shard.
        range_bytes: Parquet files above this size are cut into ranges of about this size.

    Raises:
        InputError: nothing is there, nothing in it is an input, or it could be read in two ways.
    """
    inputs = [input_uri] if isinstance(input_uri, str) else list(input_uri)
    if not inputs:
        raise InputError("input must name a file, a folder or a pattern, got none")
    if format not in ("auto", *FORMATS):
        raise InputError(f"format must be auto, {', '.join(FORMATS)}, got {format!r}")
    if limit is not None and limit < 1:
        raise InputError(f"limit must be at least 1, got {limit}")
    chosen: dict[tuple[str, Format], Sizes] = {}
    addresses: dict[str, tuple[str, ...]] = {}
    for found in map(find_files, inputs):
        addresses[found.root] = found.address
        for kind, files in choose_files(found, format).items():
            chosen.setdefault((found.root, kind), {}).update(files)
    prefixes = _prefixes(addresses)
    if len(addresses) > 1:
        _refuse_repeated(_name(prefixes[root], file) for (root, _), files in chosen.items() for file in files)
    shards: list[Shard] = []
    for (root, kind), files in chosen.items():
        if kind == "folder":
            shards += _of_folder(root, prefixes[root] or addresses[root][-1], files, files_per_shard)
        else:
            shards += _of_files(root, prefixes[root], kind, files, range_bytes)
    _refuse_repeated(shard.name for shard in shards)
    _refuse_unwritable(shards)
    shards.sort(key=lambda shard: shard.name)
    return shards if limit is None else list(_first_rows(shards, limit))


def _refuse_repeated(names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise InputError(f"inputs must not overlap, got {name} twice; name each file in one input only")
        seen.add(name)


def _refuse_unwritable(shards: Iterable[Shard]) -> None:
    for shard in shards:
        try:
            shard.name.encode()
        except UnicodeEncodeError:
            raise InputError(f"{shard.name!a} must be UTF-8, outputs are named after it; rename it") from None


def _prefixes(addresses: dict[str, tuple[str, ...]]) -> dict[str, str]:
    """What tells each root from the others: its path below the folder that all have in common."""
    columns = zip(*addresses.values(), strict=False)
    common = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
    return {root: "/".join(address[common:]) for root, address in addresses.items()}


def _name(prefix: str, file: str) -> str:
    return f"{prefix}/{file}" if prefix else file


def _of_files(root: str, prefix: str, kind: Format, files: Sizes, range_bytes: int) -> list[Shard]:
    """A shard per file, or several for a large Parquet file."""
    shards = []
    for file, size_bytes in files.items():
        if size_bytes is None and os.path.exists(os.path.join(root, file)):
            size_bytes = os.path.getsize(os.path.join(root, file))
        shards.append(
            Shard(name=_name(prefix, file), format=kind, root=root, files=(file,), size_bytes=size_bytes)
        )
    if kind != "parquet":
        return shards
    with ThreadPoolExecutor(FOOTERS_AT_ONCE) as threads:
        parts = threads.map(lambda shard: parquet.split(shard, range_bytes), shards)
        return list(chain.from_iterable(parts))


def _of_folder(root: str, name: str, files: Sizes, per_shard: int) -> Iterator[Shard]:
    """Slices of the sorted listing."""
    paths = sorted(files)
    width = len(str(len(paths) - 1))
    for start in range(0, len(paths), per_shard):
        part = paths[start : start + per_shard]
        sizes = [files[path] for path in part]
        yield Shard(
            name=f"{name}~{start:0{width}}-{start + len(part) - 1:0{width}}",
            format="folder",
            root=root,
            files=tuple(part),
            num_rows=len(part),
            size_bytes=None if None in sizes else sum(filter(None, sizes)),
        )


def _first_rows(shards: Iterable[Shard], limit: int) -> Iterator[Shard]:
    """The shards that hold the first rows, the last of them cut."""
    left = limit
    for shard in shards:
        num_rows = count_rows(shard, left)
        yield replace(shard, max_rows=left, num_rows=left) if num_rows == left else shard
        left -= num_rows
        if not left:
            return
