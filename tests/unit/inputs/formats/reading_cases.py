"""Shared by the tests of the readers: read a shard to its end, write a tar member by member."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image

from pipeline.inputs.formats import read_shard
from pipeline.inputs.reader import ReadOptions, ShardReport, ShardWork
from pipeline.inputs.shards import Format, Shard


def shard_at(path: Path, format: Format, **more: Any) -> Shard:
    return Shard(name=path.name, format=format, root=str(path.parent), files=(path.name,), **more)


def read_tables(
    shard: Shard, missing: tuple[tuple[int, int | None], ...] = ((0, None),), **options: Any
) -> tuple[list[pa.Table], ShardReport]:
    reader = read_shard(ShardWork(shard=shard, missing=missing), ReadOptions(**options))
    tables = []
    while True:
        try:
            tables.append(next(reader))
        except StopIteration as end:
            return tables, end.value


def read_rows(
    shard: Shard, missing: tuple[tuple[int, int | None], ...] = ((0, None),), **options: Any
) -> tuple[list[dict[str, Any]], ShardReport]:
    tables, report = read_tables(shard, missing, **options)
    return [row for table in tables for row in table.to_pylist()], report


def tar_bytes(members: Iterable[tuple[str, bytes]], **options: Any) -> bytes:
    """Write a tar with the given members; `options` are those of `tarfile.open`."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, **{"mode": "w"} | options) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


def not_utf8(*texts: bytes | None) -> pa.Array:
    """Return strings of arbitrary bytes, which Arrow and Parquet do not check."""
    return pa.Array.from_buffers(pa.string(), len(texts), pa.array(texts, pa.binary()).buffers())


def encoded(format: str) -> bytes:
    """Return a small image."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, format)
    return file.getvalue()


def write_tar_shard(folder: Path, content: bytes, **more: Any) -> Shard:
    """Write the bytes of a tar to a file, and return it as a shard."""
    path = folder / "0.tar"
    path.write_bytes(content)
    return shard_at(path, "webdataset", **more)


def tar_shard_of(folder: Path, *members: tuple[str, bytes]) -> Shard:
    """Write a tar with the given members to a file, and return it as a shard."""
    return write_tar_shard(folder, tar_bytes(members))
