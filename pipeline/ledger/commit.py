"""Commit a shard: merge its fragments into one Parquet file, in row order.

The file is there as a whole or not at all. The merge takes each row number once, so rows that were written
twice do no harm. An ok row wins over a row that is not ok, so the same merge adds the results of `retry` to
an existing file. A commit may be repeated at any point, even by another process.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from blip2_actor import Status
from pipeline.caption_counts import CaptionCounts
from pipeline.inputs.reader import ShardReport
from pipeline.ledger.fragments import (
    delete_shard_files,
    list_shard_files,
    read_fragment,
    read_shard_report,
    store_shard_report,
)
from pipeline.ledger.layout import is_report_of_change, output_name
from pipeline.ledger.merge import Merge, Piece, PieceGone
from pipeline.schema import ROW_CONTRACT
from pipeline.storage.folder import Folder

logger = logging.getLogger(__name__)

RUN_KEY = b"blip2.run"
SUMMARY_KEY = b"blip2.summary"
CAPTIONS_KEY = b"blip2.captions"
SAME_AGAIN = (Status.OK, Status.MISSING_IMAGE, Status.UNDECODABLE)
"""Statuses that depend on the bytes of an image alone. All others may change when the row is run again."""


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
    """Generation of the shard; see `Shard.generation`."""
    content: str | None = None
    """Digest of a sample of the input's bytes, as in the shard's report."""
    note: str | None = None
    """As in the shard's report."""
    captions: CaptionCounts = field(default_factory=CaptionCounts)
    """Counts of the captions, under a key of their own in the footer; files of version 0.1.0 have none."""
    num_bytes: int | None = field(default=None, compare=False)
    """Size of the file, if known; not in the footer."""
    written: float | None = field(default=None, compare=False)
    """When the file was written, if known, as in `WrittenFile`; not in the footer."""

    @property
    def num_failed(self) -> int:
        return self.num_rows - self.by_status.get(Status.OK.value, 0)

    @property
    def may_improve(self) -> bool:
        """Whether running the same input again may give better rows than those of the file."""
        num_final = sum(self.by_status.get(status.value, 0) for status in SAME_AGAIN)
        return not self.complete or num_final < self.num_rows


def commit_shard(
    folder: Folder,
    report: ShardReport,
    metadata: Mapping[bytes, bytes],
    empty_schema: pa.Schema = ROW_CONTRACT,
    file_name: str | None = None,
    is_shared: bool = False,
) -> Summary | None:
    """Merge the file and the fragments of a shard into its file.

    Every commit also merges the existing file: a commit that died while it deleted the fragments has put rows
    into the file that the remaining fragments may lack, or have as failed.

    A shard whose rows no merge can write gets a file without rows, which says why: it is partial. Its
    fragments stay, and `retry` merges them again.

    Args:
        report: how reading the shard ended.
        metadata: for the footer: the run's fingerprint.
        empty_schema: the schema of a shard without rows.
        file_name: name of the file; default: that of the shard.
        is_shared: whether the shard's folder may hold those of other shards; see `shared_folders`.

    Returns:
        What the file contains now. None, without any change, if rows are missing or another process commits
        the shard.
    """
    name = file_name or output_name(report.shard)
    try:
        return _commit(folder, report, metadata, empty_schema, name, is_shared)
    except PieceGone:
        return None
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, pa.ArrowKeyError) as error:
        reason = f"the rows cannot be written as one table: {error}"
        logger.error("Shard %s: %s", report.shard, reason)
        logger.debug("the error was raised here", exc_info=True)  # --verbose prints it
    there = find_summary(folder, report.shard)
    if there is not None and there.generation == report.generation:
        return there  # A retry that cannot be merged leaves the rows that are there.
    summary = Summary(
        shard=report.shard, num_rows=0, complete=False, reason=reason, generation=report.generation
    )
    return _write(folder, name, empty_schema, list, metadata, summary)


def _commit(
    folder: Folder,
    report: ShardReport,
    metadata: Mapping[bytes, bytes],
    empty_schema: pa.Schema,
    name: str,
    is_shared: bool,
) -> Summary | None:
    files = list_shard_files(folder, report.shard, report.generation)
    before, num_before = _pieces_of_file(folder, report)
    in_order = sorted(files.fragments, key=lambda fragment: fragment.first)
    merge = Merge([*(partial(read_fragment, folder, f.name) for f in in_order), *before])
    report = _with_changes(folder, report, merge, files.report)
    if report.changed:
        merge = Merge(before)
    # A shard that is read again, but not as far as before, keeps its rows.
    num_rows = max(report.num_rows, num_before)
    if not np.array_equal(merge.numbers[:num_rows], np.arange(num_rows)):
        return None
    summary = Summary(
        shard=report.shard,
        num_rows=num_rows,
        by_status=merge.by_status(num_rows),
        complete=report.complete,
        reason=report.reason,
        generation=report.generation,
        content=report.content,
        note=report.note,
    )
    schema, row_groups = merge.schema or empty_schema, partial(merge.row_groups, num_rows)
    summary = _write(folder, name, schema, row_groups, metadata, summary)
    if report.changed:  # The next run must know.
        folder.delete_files([fragment.name for fragment in files.fragments])
    else:
        # Rows past the end of a shard that was read less far are kept for a better reading.
        delete_shard_files(folder, files, num_rows, is_shared, summary.may_improve)
    return summary


def _pieces_of_file(folder: Folder, report: ShardReport) -> tuple[list[Piece], int]:
    """Return the row groups of a shard's existing file, and its number of rows.

    A file of an earlier generation does not count: a driver that was late has written it.

    Raises:
        PieceGone: the file is of a later generation, because another driver has begun the shard again.
    """
    name = output_name(report.shard)
    try:
        metadata = folder.read(name, pq.read_metadata)
    except FileNotFoundError:
        return [], 0
    generation = summary_in(metadata.metadata).generation
    if generation > report.generation:
        raise PieceGone
    if generation < report.generation:
        return [], 0

    def read(group: int) -> pa.Table:
        return folder.read(name, lambda file: pq.ParquetFile(file).read_row_group(group))

    return [partial(read, group) for group in range(metadata.num_row_groups)], metadata.num_rows


def _with_changes(folder: Folder, report: ShardReport, merge: Merge, stored_name: str | None) -> ShardReport:
    """Return the report of a shard, or one without rows if the shard's input has changed.

    Either the read task notices the change, or two pieces have different keys for the same row: then one of
    them was read from another input.

    Args:
        stored_name: file with the latest stored report.
    """
    if report.changed:
        return report
    if stored_name is not None and is_report_of_change(stored_name):
        stored = read_shard_report(folder, stored_name)
        if stored is not None:
            return stored
    conflict = merge.first_conflict()
    if conflict is None:
        return report
    row, first, second = conflict
    reason = (
        f"the input has changed since its first rows were written: row {row} was read as {first} and as "
        f"{second}; --redo-changed makes all rows of the shard again"
    )
    changed = replace(report, num_rows=0, complete=False, changed=True, content=None, reason=reason)
    store_shard_report(folder, changed)
    return changed


def _write(
    folder: Folder,
    name: str,
    schema: pa.Schema,
    row_groups: Callable[[], Iterable[pa.Table]],
    metadata: Mapping[bytes, bytes],
    summary: Summary,
) -> Summary:
    """Write the file of a shard; return its summary with its size and the counts of its captions.

    Args:
        row_groups: yields the rows; called again for each retry.
    """

    def write(file: IO[bytes]) -> Summary:
        counts = []
        # Without rows there is no row group: the datasets library cannot read one that is empty.
        with pq.ParquetWriter(
            file, schema.with_metadata(dict(metadata)), compression="zstd", write_page_checksum=True
        ) as writer:
            for rows in row_groups():
                writer.write_table(rows, len(rows))
                counts.append(CaptionCounts.of_rows(rows))
            written = replace(summary, captions=CaptionCounts.sum_of(counts))
            writer.add_key_value_metadata(_footer(written))
        return replace(written, num_bytes=file.tell())

    return folder.put_made(name, write)


def read_summary(folder: Folder, shard: str) -> Summary:
    """Return the summary in the footer of a finished shard's file."""
    return summary_in(folder.read(output_name(shard), lambda file: pq.read_metadata(file).metadata or {}))


def find_summary(folder: Folder, shard: str) -> Summary | None:
    """Return the summary of a shard, or None when it has no file."""
    try:
        return read_summary(folder, shard)
    except FileNotFoundError:
        return None


def summary_in(metadata: Mapping[bytes, bytes]) -> Summary:
    """Return the summary in the metadata of a footer."""
    captions = CaptionCounts(**json.loads(metadata.get(CAPTIONS_KEY, b"{}")))
    return Summary(**json.loads(metadata[SUMMARY_KEY]), captions=captions)


def _footer(summary: Summary) -> dict[bytes, bytes]:
    values = asdict(summary)
    captions = values.pop("captions")
    del values["num_bytes"], values["written"]
    return {SUMMARY_KEY: json.dumps(values).encode(), CAPTIONS_KEY: json.dumps(captions).encode()}
