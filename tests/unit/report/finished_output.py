"""A run with known rows, written without Ray and without an input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.inputs.reader import ShardReport
from pipeline.inputs.shards import Shard
from pipeline.ledger.commit import commit_shard
from pipeline.ledger.fragments import write_fragment
from pipeline.ledger.ledger import Ledger
from pipeline.ledger.run_record import Run
from pipeline.settings.fingerprint import Fingerprint
from pipeline.settings.job_settings import CaptionSettings
from pipeline.storage.folder import Folder


def write_output(
    root: Path,
    shards: Mapping[str, Sequence[Mapping[str, Any]]],
    schema: pa.Schema,
    unfinished: Sequence[str] = (),
    parts: Mapping[str, Any] | None = None,
) -> Folder:
    """Write a run with a file for each shard.

    Args:
        shards: the rows of each shard; they are numbered here.
        unfinished: further shards, which have no file.
        parts: the parts of the fingerprint.
    """
    settings = CaptionSettings(input=(str(root / "none"),), output=str(root))
    folder = Folder(settings.output)
    listed = [
        Shard(name=name, format="webdataset", root="/none", files=(name,)) for name in (*shards, *unfinished)
    ]
    Ledger(folder).begin(Run(Fingerprint(parts or {}), settings.to_dict(), tuple(listed)))
    for name, rows in shards.items():
        numbered = [{**row, "shard": name, "row": number} for number, row in enumerate(rows)]
        write_shard(folder, name, pa.Table.from_pylist(numbered, schema=schema))
    return folder


def write_shard(folder: Folder, shard: str, rows: pa.Table) -> None:
    """Write the file of a shard with all its rows."""
    if len(rows):
        write_fragment(folder, rows)
    commit_shard(folder, ShardReport(shard=shard, num_rows=len(rows), complete=True), {}, rows.schema)
