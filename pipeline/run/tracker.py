"""`Tracker`: which rows of each open shard have reached a fragment, and how many have failed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from blip2_actor import Status
from pipeline.inputs.reader import ShardReport
from pipeline.ledger.scan import ShardProgress
from pipeline.stages.receipts import Receipt

FAILURES_COUNT_AFTER_ROWS = 500
"""Number of rows from which on failures count; fewer do not show whether the input as a whole fails."""
MAX_FAILED_FRACTION = 0.5


class Tracker:
    """The driver's view of the shards that are not committed.

    A row counts once, however often its receipt arrives. A shard is dropped when it is handed over to be
    committed; later receipts of it are ignored.
    """

    def __init__(self, unfinished: Iterable[ShardProgress], usual_rows: float | None = None) -> None:
        """Begin with the progress of the shards.

        Args:
            usual_rows: assumed number of rows of a shard until the length of one is known.
        """
        self._usual_rows = usual_rows
        self._open = {progress.shard.name: progress for progress in unfinished}
        self._changed: set[str] = set(self._open)
        self._num_closed = self._closed_rows = 0
        # Sums over the open shards are kept up to date, because there may be 10^5 of them.
        lengths = [_length(progress) for progress in self._open.values()]
        self._num_unknown = lengths.count(None)
        self._known_rows = sum(length for length in lengths if length is not None)
        self._open_done = sum(len(progress.done) for progress in self._open.values())
        self.num_rows = 0
        """Rows finished in this attempt."""
        self.by_status: Counter[str] = Counter()

    @property
    def num_failed(self) -> int:
        # If only some rows of a receipt are new, the statuses of all are counted.
        return max(0, self.num_rows - self.by_status[Status.OK.value])

    @property
    def num_open(self) -> int:
        return len(self._open)

    def add(self, receipt: Receipt) -> None:
        """Count the rows of a receipt that are new."""
        progress = self._open.get(receipt.shard)
        if progress is None:
            return
        self._changed.add(receipt.shard)
        before = len(progress.done)
        progress.done.update(receipt.ranges)
        num_new = len(progress.done) - before
        if num_new:
            self.num_rows += num_new
            self._open_done += num_new
            self.by_status.update(dict(receipt.by_status))

    def add_report(self, report: ShardReport) -> None:
        """Note how reading a shard ended; Ray may read it again, and report it again."""
        progress = self._open.get(report.shard)
        if progress is None or not report.replaces(progress.report):
            return
        before = _length(progress)
        self._num_unknown -= before is None
        self._known_rows += report.num_rows - (before or 0)
        progress.report = report
        self._changed.add(report.shard)

    def without_report(self) -> list[str]:
        """Return the open shards whose report has not arrived."""
        return [name for name, progress in self._open.items() if progress.report is None]

    def take_complete(self) -> list[ShardReport]:
        """Drop the shards whose rows have all arrived, and return their reports."""
        changed = [self._open[name] for name in self._changed if name in self._open]
        self._changed.clear()
        complete = [progress for progress in changed if progress.is_complete]
        for progress in complete:
            del self._open[progress.shard.name]
            self._num_closed += 1
            num_rows = _length(progress) or 0
            self._closed_rows += num_rows
            self._known_rows -= num_rows
            self._open_done -= len(progress.done)
        return [progress.report for progress in complete if progress.report is not None]

    def estimate_rows_left(self) -> float | None:
        """Return the rows still to do, or None; an open shard of unknown length counts as an average one."""
        average = self.mean_rows
        if average is None:
            return None
        return max(0.0, self._known_rows + self._num_unknown * average - self._open_done)

    @property
    def mean_rows(self) -> float | None:
        """Mean number of rows of the shards of known length; None if no length is known."""
        num_known = len(self._open) - self._num_unknown + self._num_closed
        return (self._known_rows + self._closed_rows) / num_known if num_known else self._usual_rows

    def has_too_many_failures(self, max_failed_fraction: float) -> bool:
        """Return whether so many rows have failed that the run should stop."""
        limit = max(max_failed_fraction, MAX_FAILED_FRACTION)
        return self.num_rows >= FAILURES_COUNT_AFTER_ROWS and self.num_failed > limit * self.num_rows


def _length(progress: ShardProgress) -> int | None:
    return progress.report.num_rows if progress.report is not None else progress.shard.num_rows
