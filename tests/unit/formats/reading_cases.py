"""What the tests of the readers share: read a shard to its end, write a tar member by member."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa

from pipeline.formats import read_shard
from pipeline.inputs.reader import ReadOptions, ShardReport, ShardWork
from pipeline.inputs.shards import Format, Shard


def shard_at(path: Path, format: Format, **more: object) -> Shard:
    return Shard(name=path.name, format=format, root=str(path.parent), files=(path.name,), **more)


def read_tables(
    shard: Shard, missing: tuple[tuple[int, int | None], ...] | None = None, **options: object
) -> tuple[list[pa.Table], ShardReport]:
    reader = read_shard(ShardWork(shard=shard, missing=missing), ReadOptions(**options))
    tables = []
    while True:
        try:
            tables.append(next(reader))
        except StopIteration as end:
            return tables, end.value


def read_rows(
    shard: Shard, missing: tuple[tuple[int, int | None], ...] | None = None, **options: object
) -> tuple[list[dict], ShardReport]:
    tables, report = read_tables(shard, missing, **options)
    return [row for table in tables for row in table.to_pylist()], report


def tar_bytes(members: Iterable[tuple[str, bytes]], mode: str = "w", **more: object) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode, **more) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file.getvalue()
