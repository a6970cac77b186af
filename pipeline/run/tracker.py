"""The driver's books: which rows of which open shard have reached a fragment, and what became of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from blip2_actor import Status
from pipeline.inputs.reader import ShardReport
from pipeline.ledger.ledger import ShardProgress
from pipeline.stages.receipts import Receipt

FAILURES_COUNT_AFTER_ROWS = 500
MAX_FAILED_FRACTION = 0.5


class Tracker:
    """Counts rows once, whatever arrives twice; forgets a shard once it is handed over for committing."""

    def __init__(self, unfinished: Iterable[ShardProgress]) -> None:
        self._open = {progress.shard.name: progress for progress in unfinished}
        self._touched: set[str] = set(self._open)
        self._num_closed = self._closed_rows = 0
        self.num_rows = 0
        """Rows finished in this session."""
        self.by_status: Counter[str] = Counter()

    @property
    def num_failed(self) -> int:
        return self.num_rows - self.by_status[Status.OK.value]

    @property
    def num_open(self) -> int:
        return len(self._open)

    def add(self, receipt: Receipt) -> None:
        progress = self._open.get(receipt.shard)
        if progress is None:
            return
        self._touched.add(receipt.shard)
        before = len(progress.done)
        progress.done.update(receipt.ranges)
        if len(progress.done) > before:
            self.num_rows += len(progress.done) - before
            self.by_status.update(dict(receipt.by_status))

    def ended(self, report: ShardReport) -> None:
        """Note how reading a shard ended."""
        if report.shard in self._open:
            self._open[report.shard].report = report
            self._touched.add(report.shard)

    def knows_end(self, shard: str) -> bool:
        return shard not in self._open or self._open[shard].report is not None

    def take_complete(self) -> list[ShardReport]:
        """Hand over the shards whose rows are all there."""
        touched = [self._open[name] for name in self._touched if name in self._open]
        self._touched.clear()
        complete = [progress for progress in touched if progress.is_complete]
        for progress in complete:
            del self._open[progress.shard.name]
            self._num_closed += 1
            self._closed_rows += _length(progress) or 0
        return [progress.report for progress in complete if progress.report is not None]

    def estimate_rows_left(self) -> float | None:
        """Rows still to do; open shards of unknown length are taken to be as long as the others."""
        lengths = [_length(progress) for progress in self._open.values()]
        known = [length for length in lengths if length is not None]
        num_known = len(known) + self._num_closed
        if not num_known:
            return None
        typical = (sum(known) + self._closed_rows) / num_known
        done = sum(len(progress.done) for progress in self._open.values())
        return max(0.0, sum(typical if length is None else length for length in lengths) - done)

    def has_too_many_failures(self, max_failed_fraction: float) -> bool:
        """Whether so much has failed that going on is pointless."""
        limit = max(max_failed_fraction, MAX_FAILED_FRACTION)
        return self.num_rows >= FAILURES_COUNT_AFTER_ROWS and self.num_failed > limit * self.num_rows


def _length(progress: ShardProgress) -> int | None:
    return progress.report.num_rows if progress.report is not None else progress.shard.num_rows
