"""Commit a shard: merge its fragments into one Parquet file, in row order.

The file is there as a whole or not at all. The merge takes each row number once, so rows that were written
twice do no harm. An ok row wins over a row that is not ok, so the same merge adds what `retry` has made to a
file that exists. A commit may be repeated at any point, also by another process.
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from blip2_actor import Status
from pipeline.caption_counts import CaptionCounts
from pipeline.inputs.reader import ShardReport
from pipeline.ledger.fragments import delete_fragments, list_fragments, read_fragments
from pipeline.ledger.layout import output_name, shard_report_name
from pipeline.ledger.shard_progress import load_shard_report, store_shard_report
from pipeline.schema import ROW_CONTRACT
from pipeline.storage.folder import Folder

logger = logging.getLogger(__name__)

RUN_KEY = b"blip2.run"
SUMMARY_KEY = b"blip2.summary"
CAPTIONS_KEY = b"blip2.captions"
ROW_GROUP_BYTES = 32 << 20
MAX_ROW_GROUP_ROWS = 65_536


@dataclass(frozen=True)
class Summary:
    """What the file of a finished shard contains; stored in its footer."""

    shard: str
    num_rows: int
    by_status: Mapping[str, int] = field(default_factory=dict)
    complete: bool = True
    reason: str | None = None
    """Why the shard is partial, when it is."""
    generation: int = 0
    """Of the shard; see `Shard.generation`."""
    content: str | None = None
    """Digest of a sample of the input's bytes, as in the shard's report."""

    captions: CaptionCounts = field(default_factory=CaptionCounts)
    """In a place of its own in the footer; files of version 0.1.0 have none."""

    @property
    def num_failed(self) -> int:
        return self.num_rows - self.by_status.get(Status.OK.value, 0)


def commit_shard(
    folder: Folder,
    report: ShardReport,
    metadata: Mapping[bytes, bytes],
    empty_schema: pa.Schema = ROW_CONTRACT,
    file_name: str | None = None,
) -> Summary | None:
    """Merge the file and the fragments of a shard into its file.

    A shard whose rows no merge can write gets a file without rows, which says why: it is partial. Its
    fragments stay, and `retry` merges them again.

    Args:
        report: how reading the shard ended.
        metadata: for the footer: the run's fingerprint.
        empty_schema: the schema of a shard without rows.
        file_name: name of the file; default: that of the shard.

    Returns:
        What the file contains now, or None when rows are missing: then nothing has changed.
    """
    name = file_name or output_name(report.shard)
    try:
        return _commit(folder, report, metadata, empty_schema, name)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, pa.ArrowKeyError) as error:
        reason = f"the rows cannot be written as one table: {error}"
        logger.exception("Shard %s: %s", report.shard, reason)
    if folder.exists(name):  # A retry that cannot be merged leaves the rows that are there.
        return read_summary(folder, report.shard)
    summary = Summary(
        shard=report.shard, num_rows=0, complete=False, reason=reason, generation=report.generation
    )
    folder.put(name, _parquet(empty_schema.empty_table(), {**metadata, **_footer(summary)}))
    return summary


def _commit(
    folder: Folder, report: ShardReport, metadata: Mapping[bytes, bytes], empty_schema: pa.Schema, name: str
) -> Summary | None:
    fragments = list_fragments(folder, report.shard, report.generation)
    before = read_rows(folder, report.shard)
    found = [table for table in [*read_fragments(folder, fragments), before] if table is not None]
    report = _with_changes(folder, report, found)
    # A shard that is read again, and can be read less far, keeps its rows.
    num_rows = max(report.num_rows, 0 if before is None else len(before))
    if report.changed:
        found = [] if before is None else [before]
    rows = merge(found).slice(0, num_rows) if found else empty_schema.empty_table()
    if rows["row"].to_pylist() != list(range(num_rows)):
        return None
    summary = Summary(
        shard=report.shard,
        num_rows=num_rows,
        by_status=_counts(rows["status"]),
        complete=report.complete,
        reason=report.reason,
        captions=CaptionCounts.of_rows(rows),
        generation=report.generation,
        content=report.content,
    )
    content = _parquet(rows, {**metadata, **_footer(summary)})
    folder.put(name, content)
    # Rows past the end of a shard that was read less far are kept for a better reading.
    finished = [f for f in fragments if f.last < num_rows or report.changed]
    delete_fragments(folder, report.shard, finished, report.generation)
    if not report.changed:  # The next run must know.
        folder.delete(shard_report_name(report.shard, report.generation))
    return summary


def _with_changes(folder: Folder, report: ShardReport, tables: list[pa.Table]) -> ShardReport:
    """Return the report of a shard, or one without rows if the shard's input has changed.

    The read task notices a change, or here two tables have the same row with different keys: then one of them
    was read from another input.
    """
    if report.changed:
        return report
    stored = load_shard_report(folder, report.shard, report.generation)
    if stored is not None and stored.changed:
        return stored
    conflict = _first_conflict(tables)
    if conflict is None:
        return report
    changed = replace(report, num_rows=0, complete=False, changed=True, content=None, reason=conflict)
    store_shard_report(folder, changed)
    return changed


def _first_conflict(tables: list[pa.Table]) -> str | None:
    """Return a sentence about the first row that has different keys in the tables, or None."""
    if len(tables) < 2:
        return None
    rows = pa.concat_tables([table.select(["row", "key"]) for table in tables])
    keys = rows.group_by("row").aggregate([("key", "min"), ("key", "max")]).sort_by("row")
    conflicts = keys.filter(pc.not_equal(keys["key_min"], keys["key_max"]))
    if not len(conflicts):
        return None
    row = conflicts.slice(0, 1).to_pylist()[0]
    return (
        f"the input has changed since its first rows were written: row {row['row']} was read as "
        f"{row['key_min']} and as {row['key_max']}; --redo-changed makes all rows of the shard again"
    )


def merge(tables: list[pa.Table]) -> pa.Table:
    """Return each row number once, in order: an ok row if there is one, else the row of the first table."""
    rows = pa.concat_tables(tables, promote_options="permissive").combine_chunks()
    numbers = rows["row"].to_numpy()
    not_ok = pc.not_equal(rows["status"], Status.OK.value).to_numpy()
    order = np.lexsort((np.arange(len(numbers)), not_ok, numbers))
    first = np.ones(len(order), bool)
    first[1:] = numbers[order][1:] != numbers[order][:-1]
    return rows.take(pa.array(order[first]))


def read_rows(folder: Folder, shard: str) -> pa.Table | None:
    """Return the rows of a finished shard, or None when it has no file."""
    content = folder.get(output_name(shard))
    if content is None:
        return None
    return pq.read_table(io.BytesIO(content)).replace_schema_metadata(None)


def read_summary(folder: Folder, shard: str) -> Summary:
    """Return the summary in the footer of a finished shard's file."""
    metadata = folder.read(output_name(shard), lambda file: pq.read_metadata(file).metadata or {})
    captions = CaptionCounts(**json.loads(metadata.get(CAPTIONS_KEY, b"{}")))
    return Summary(**json.loads(metadata[SUMMARY_KEY]), captions=captions)


def _counts(column: pa.ChunkedArray) -> dict[str, int]:
    counts = pc.value_counts(column.combine_chunks()).to_pylist()
    return {entry["values"]: entry["counts"] for entry in sorted(counts, key=lambda e: str(e["values"]))}


def _footer(summary: Summary) -> dict[bytes, bytes]:
    values = asdict(summary)
    captions = values.pop("captions")
    return {SUMMARY_KEY: json.dumps(values).encode(), CAPTIONS_KEY: json.dumps(captions).encode()}


def _parquet(rows: pa.Table, metadata: Mapping[bytes, bytes]) -> bytes:
    row_bytes = max(1, rows.nbytes // max(1, len(rows)))
    group_rows = min(MAX_ROW_GROUP_ROWS, max(1, ROW_GROUP_BYTES // row_bytes))
    sink = pa.BufferOutputStream()
    pq.write_table(
        rows.replace_schema_metadata(dict(metadata)), sink, row_group_size=group_rows, compression="zstd"
    )
    return sink.getvalue().to_pybytes()
