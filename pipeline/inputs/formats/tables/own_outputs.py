"""Tables that a run has written: they are no input, unless they are named one by one.

The footer of such a table says so. Of a table that is not to be read, only its place is looked at.
"""

from __future__ import annotations

import contextlib
import posixpath
from collections.abc import Collection, Iterator, Sequence

import pyarrow as pa
import pyarrow.fs as pafs

from pipeline.errors import InputError
from pipeline.inputs.formats.tables import parquet
from pipeline.inputs.shards import Shard
from pipeline.schema import FINGERPRINT_KEY
from pipeline.storage.filesystems import at_once, join, open_filesystem

RUN_RECORD = "_blip2/run.json"
"""A folder that holds this file is the output of a run."""


def tables_of_runs(root: str, tables: Sequence[str], known: Collection[str]) -> set[str]:
    """Return the tables that a run has written, as their footers say."""

    def is_own(table: str) -> bool:
        try:
            schema = parquet.schema_of(Shard(name=table, format="parquet", root=root, files=(table,)))
        except InputError:
            return False  # Reading the table says what is wrong.
        return FINGERPRINT_KEY in (schema.metadata or {})

    tables = [table for table in tables if table not in known]
    return {table for table, own in zip(tables, at_once(is_own, tables), strict=True) if own}


def tables_in_outputs(root: str, tables: Sequence[str]) -> set[str]:
    """Return the tables in folders of outputs, which hold the state of a run; no table is opened."""
    if not tables:
        return set()
    filesystem, base = open_filesystem(root)

    def is_output(folder: str) -> bool:
        with contextlib.suppress(OSError, UnicodeError, pa.ArrowException):
            (info,) = filesystem.get_file_info([join(join(base, folder), RUN_RECORD)])
            return info.type == pafs.FileType.File
        return False

    folders = sorted({folder for table in tables for folder in _folders_above(table)})
    outputs = {folder for folder, is_one in zip(folders, at_once(is_output, folders), strict=True) if is_one}
    return {table for table in tables if not outputs.isdisjoint(_folders_above(table))}


def _folders_above(file: str) -> Iterator[str]:
    """Yield each folder that a file is in, the root as an empty name last."""
    while file:
        file = posixpath.dirname(file)
        yield file
