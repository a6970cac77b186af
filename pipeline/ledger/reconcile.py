"""Reconciliation: every listed shard has its file, and its rows are ok or failed, by status.

Read from the output alone: the footers of the finished files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from blip2_actor import Status
from pipeline.inputs.shards import Shard
from pipeline.ledger.commit import Summary, read_summary
from pipeline.storage.folder import Folder

MAX_NAMED = 5
"""Shards named one by one in a report; the others are counted."""


@dataclass(frozen=True)
class Reconciliation:
    """What a run's output holds against what was listed."""

    num_shards: int
    summaries: tuple[Summary, ...]
    missing: tuple[str, ...]
    """Shards without a file."""

    @property
    def num_rows(self) -> int:
        return sum(summary.num_rows for summary in self.summaries)

    @property
    def by_status(self) -> Counter[str]:
        return sum((Counter(dict(summary.by_status)) for summary in self.summaries), Counter())

    @property
    def num_ok(self) -> int:
        return self.by_status[Status.OK.value]

    @property
    def num_failed(self) -> int:
        return self.num_rows - self.num_ok

    @property
    def partial(self) -> list[Summary]:
        """Shards that end early or could not be read: how many rows they lack is not known."""
        return [summary for summary in self.summaries if not summary.complete]

    @property
    def failed_fraction(self) -> float:
        """Share of the rows that failed; a partial shard counts as one more row that did."""
        lost = len(self.partial)
        rows = self.num_rows + lost
        return (self.num_failed + lost) / rows if rows else 0.0

    def exit_status(self, max_failed_fraction: float) -> int:
        """0 done, 2 when too much failed, 1 when something is missing."""
        if self.missing or self.num_rows != sum(self.by_status.values()):
            return 1
        return 2 if self.failed_fraction > max_failed_fraction else 0

    def lines(self, is_over: bool = True) -> list[str]:
        """The report; of a run that may still go on, shards without a file are not missing but left."""
        failed = ", ".join(
            f"{n:,} {status}" for status, n in sorted(self.by_status.items()) if status != "ok"
        )
        lines = [
            f"rows in {self.num_rows:,} = ok {self.num_ok:,} + failed {self.num_failed:,}"
            + (f" ({failed})" if failed else ""),
            f"shards {self.num_shards:,} = written {len(self.summaries):,} + "
            f"{'missing' if is_over else 'left'} {len(self.missing):,}",
        ]
        lines += _named([f"partial: {summary.shard}: {summary.reason}" for summary in self.partial])
        return lines + (_named([f"missing: {shard}" for shard in self.missing]) if is_over else [])


def reconcile(folder: Folder, shards: Sequence[Shard], finished: frozenset[str]) -> Reconciliation:
    names = [shard.name for shard in shards]
    with ThreadPoolExecutor(16) as pool:
        written = [name for name in names if name in finished]
        summaries = tuple(pool.map(lambda name: read_summary(folder, name), written))
    return Reconciliation(len(names), summaries, tuple(name for name in names if name not in finished))


def _named(lines: list[str]) -> list[str]:
    more = len(lines) - MAX_NAMED
    return lines[:MAX_NAMED] + ([f"... and {more:,} more"] if more > 0 else [])
