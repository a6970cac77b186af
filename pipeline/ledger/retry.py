"""Which rows of a finished run `retry` runs again: those that are not ok, or those that are chosen.

The missing rows of a partial shard are read again as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from blip2_actor import Status
from pipeline.inputs.reader import ShardReport
from pipeline.ledger.commit import Summary
from pipeline.ledger.fragments import rows_in
from pipeline.ledger.layout import output_name
from pipeline.ledger.run_record import Run
from pipeline.ledger.scan import OutputState, ShardProgress, unfinished
from pipeline.ledger.summaries import load_summaries
from pipeline.progress import count
from pipeline.rowset import RowSet, ranges_of
from pipeline.storage.filesystems import at_once
from pipeline.storage.folder import Folder
from pipeline.storage.retrying_file import read_file

WHOLE = ((0, None),)
"""The missing rows of a shard that must be read from its beginning to its unknown end."""


@dataclass(frozen=True)
class RowChoice:
    """Which rows of the finished shards are run again; the default is every row that is not ok."""

    statuses: frozenset[str] = frozenset()
    """Only rows with one of these; empty means every status but ok."""
    keys: frozenset[str] | None = None
    """Only rows with one of these keys; None means any key."""

    @property
    def is_all(self) -> bool:
        """Whether all rows that are not ok are chosen, including those that partial shards lack."""
        return not self.statuses and self.keys is None

    def concerns(self, summary: Summary) -> bool:
        """Return whether a finished shard may have chosen rows."""
        if self.statuses:
            return any(summary.by_status.get(status) for status in self.statuses)
        return bool(summary.num_failed) or (self.is_all and not summary.complete)

    def others(self, rows: pa.Table) -> RowSet:
        """Return the rows of a table that are not chosen.

        Args:
            rows: with the columns row and status, and key if keys are chosen.
        """
        if self.statuses:
            is_chosen = pc.is_in(rows["status"], pa.array(sorted(self.statuses)))
        else:
            is_chosen = pc.not_equal(rows["status"], Status.OK.value)
        if self.keys is not None:
            is_chosen = pc.and_(is_chosen, pc.is_in(rows["key"], pa.array(sorted(self.keys), pa.string())))
        return RowSet(ranges_of(rows.filter(pc.invert(is_chosen))["row"].to_pylist()))


def read_keys(path: str) -> frozenset[str]:
    """Read a file with one key a line, by its path or URI; empty lines do not count.

    Raises:
        ValueError: the file cannot be read, is not UTF-8, or has no key.
    """
    try:
        content = read_file("keys", path).decode("utf-8-sig")  # some editors write the byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"keys must be a UTF-8 file with one key a line, got {path}: {error}") from None
    lines = content.replace("\r\n", "\n").split("\n")  # Keys may hold other line ends.
    keys = frozenset(filter(None, lines))
    if not keys:
        raise ValueError(f"keys must be a file with one key a line, got {path}, which has none")
    return keys


def to_retry(folder: Folder, run: Run, state: OutputState, choice: RowChoice) -> list[ShardProgress]:
    """Return the shards with rows to run again; their other rows count as done.

    Shards that were begun again have no file, and all their rows are run.
    """
    by_name = {shard.name: shard for shard in run.shards if shard.name in state.finished}
    summaries, _ = load_summaries(folder, state, list(by_name))
    concerned = [summary for summary in summaries if choice.concerns(summary)]
    in_fragments = rows_in(folder, {s.shard: state.fragments.get(s.shard, ()) for s in concerned})
    progress = unfinished(folder, run, state)
    others = at_once(partial(_others, folder, choice), concerned)
    for summary, done in zip(concerned, others, strict=True):
        if not choice.is_all and done.covers(summary.num_rows):
            continue
        done.update(in_fragments[summary.shard])
        progress.append(ShardProgress(by_name[summary.shard], done, report_of(summary)))
    return progress


def _others(folder: Folder, choice: RowChoice, summary: Summary) -> RowSet:
    """Return the rows of a finished shard that are not chosen."""
    columns = ["row", "status"] if choice.keys is None else ["row", "status", "key"]
    rows = folder.read(output_name(summary.shard), lambda file: pq.ParquetFile(file).read(columns))
    return choice.others(rows)


def describe_work(left: Sequence[ShardProgress], choice: RowChoice) -> str:
    """Say how many rows are run again; it is not known for shards that are read from their beginning."""
    works = [progress.work.missing for progress in left]
    spans = [span for missing in works if missing != WHOLE for span in missing]
    num_whole = works.count(WHOLE)
    phrases = [f"all rows of {count(num_whole, 'shard')} to run again"] if num_whole else []
    if spans or not phrases:
        num_rows = sum(stop - start for start, stop in spans if stop is not None)
        rest = ", and what partial shards lack" if any(stop is None for _, stop in spans) else ""
        num_shards = len(left) - num_whole
        phrases.insert(0, f"{count(num_rows, 'row')} to run again in {count(num_shards, 'shard')}{rest}")
    of_keys = "" if choice.keys is None else f", of {count(len(choice.keys), 'key')}"
    return "; ".join(phrases) + of_keys


def require_finished(folder: Folder, run: Run, state: OutputState) -> None:
    """Raise ValueError if a shard has no file, unless an earlier retry has begun it again."""
    left = [s.name for s in run.shards if s.name not in state.finished and not s.generation]
    if left:
        raise ValueError(
            f"output must hold a finished run, got {folder} with {count(len(left), 'unfinished shard')}; "
            "run the caption command again first"
        )


def report_of(summary: Summary) -> ShardReport | None:
    """Return how reading a finished shard ended, or None for a partial shard, which must be read again."""
    if not summary.complete:
        return None
    return ShardReport(
        shard=summary.shard,
        num_rows=summary.num_rows,
        complete=True,
        generation=summary.generation,
        content=summary.content,
        note=summary.note,
    )
