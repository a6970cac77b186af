"""A finished run over a real input, written without Ray and without a model."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.inputs.formats import read_shard
from pipeline.inputs.listing import list_shards
from pipeline.inputs.reader import ReadOptions, ShardWork
from pipeline.inputs.shards import Shard
from pipeline.ledger.ledger import Ledger
from pipeline.ledger.run_record import Run
from pipeline.schema import output_schema
from pipeline.settings.fingerprint import Fingerprint
from pipeline.settings.job_settings import CaptionSettings
from pipeline.storage.folder import Folder
from tests.unit.report.finished_output import write_shard

SCHEMA = output_schema([], [pa.field("color", pa.string()), pa.field("vector", pa.list_(pa.float32()))])


def write_run(source: Path, output: Path, failed: Collection[int] = ()) -> list[dict[str, Any]]:
    """Write a finished run, and return its rows in order.

    Args:
        failed: numbers of the rows that fail in every shard.
    """
    settings = CaptionSettings(input=(str(source),), output=str(output))
    folder = Folder(settings.output)
    shards = tuple(list_shards(settings.input))
    run = Run(Fingerprint({}), settings.to_dict(), shards, working_folder="/", hides_options=False)
    Ledger(folder).begin(run)
    rows = []
    for shard in run.shards:
        made = [_row(cells, failed) for cells in _read(shard)]
        write_shard(folder, shard.name, pa.Table.from_pylist(made, schema=SCHEMA))
        rows += made
    return pa.Table.from_pylist(rows, schema=SCHEMA).to_pylist()


def _read(shard: Shard) -> list[dict[str, Any]]:
    tables = read_shard(ShardWork(shard=shard), ReadOptions())
    return [cells for table in tables for cells in table.to_pylist()]


def _row(cells: dict[str, Any], failed: Collection[int]) -> dict[str, Any]:
    row = {name: cells[name] for name in ("key", "shard", "row", "member")} | {"flags": []}
    if cells["row"] in failed:
        return row | {"status": "undecodable", "error": 'the image is "odd", and\nbroken'}
    row |= {"status": "ok", "caption": f'a "cat", no. {cells["row"]}\nof {cells["key"]}', "logprob": -0.5}
    row |= {"color": "" if cells["row"] == 1 else "red", "vector": [0.25, cells["row"]], "num_tokens": 3}
    return row | {"sha256": hashlib.sha256(cells["image"]).digest(), "width": 24, "height": 20}
