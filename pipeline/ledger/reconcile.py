"""Compare a run with its output and with its input.

Reconciliation: every listed shard has its file, and every row in it is ok or has failed, by status. It reads
the output alone, from the summaries of the finished shards, and decides the exit status of a run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from blip2_actor import Status
from pipeline.caption_counts import CaptionCounts
from pipeline.inputs.changes import NO_FILES, InputChanges, find_changes
from pipeline.inputs.globs import Patterns
from pipeline.inputs.listing import list_files
from pipeline.inputs.shards import Shard
from pipeline.ledger.commit import Summary, find_summary
from pipeline.ledger.layout import FRAGMENTS, is_report_of_change
from pipeline.ledger.run_record import Run
from pipeline.ledger.scan import OutputState, scan_output
from pipeline.ledger.summaries import load_summaries
from pipeline.progress import count
from pipeline.storage.folder import Folder

MAX_NAMED = 5
"""How many shards a report names; it counts the others."""


@dataclass(frozen=True)
class Reconciliation:
    """What the output of a run contains, compared with the shards that were listed."""

    num_shards: int
    summaries: tuple[Summary, ...]
    missing: tuple[str, ...]
    """Shards without a file."""
    unkept: frozenset[str] = frozenset()
    """Shards whose summary is in no file of kept summaries; it was read from a footer."""

    @cached_property
    def num_rows(self) -> int:
        return sum(summary.num_rows for summary in self.summaries)

    @cached_property
    def by_status(self) -> Counter[str]:
        counts: Counter[str] = Counter()
        for summary in self.summaries:
            counts.update(summary.by_status)
        return counts

    @property
    def num_ok(self) -> int:
        return self.by_status[Status.OK.value]

    @property
    def num_failed(self) -> int:
        return self.num_rows - self.num_ok

    @property
    def partial(self) -> list[Summary]:
        """Shards that end early or cannot be read; how many rows they lack is not known."""
        return [summary for summary in self.summaries if not summary.complete]

    @property
    def failed_fraction(self) -> float:
        """Share of the rows that failed; a partial shard counts as one more failed row."""
        lost = len(self.partial)
        rows = self.num_rows + lost
        return (self.num_failed + lost) / rows if rows else 0.0

    @cached_property
    def captions(self) -> CaptionCounts:
        return CaptionCounts.sum_of(summary.captions for summary in self.summaries)

    def exit_status(self, max_failed_fraction: float, max_flagged_fraction: float = 1.0) -> int:
        """Return 1 when something is missing, 2 when more failed or is flagged than allowed, else 0."""
        if self.missing or self.num_rows != sum(self.by_status.values()):
            return 1
        is_flagged = self.captions.flagged_fraction > max_flagged_fraction
        return 2 if self.failed_fraction > max_failed_fraction or is_flagged else 0

    def lines(self, is_over: bool = True) -> list[str]:
        """Return the report; while the run may be resumed, shards without a file are left and not missing."""
        failed = ", ".join(
            f"{n:,} {status}" for status, n in sorted(self.by_status.items()) if status != "ok"
        )
        lines = [
            f"{count(self.num_rows, 'row')} = {self.num_ok:,} ok + {self.num_failed:,} failed"
            + (f" ({failed})" if failed else ""),
            f"{count(self.num_shards, 'shard')} = {len(self.summaries):,} written + "
            f"{len(self.missing):,} {'missing' if is_over else 'left'}",
        ]
        lines += _shorten([f"partial: {summary.shard}: {summary.reason}" for summary in self.partial])
        if self.partial:
            lines.append("blip2 retry reads partial shards again; repair or replace their files first")
        lines += _shorten([f"note: {s.shard}: {s.note}" for s in self.summaries if s.note])
        lines += _shorten([f"missing: {shard}" for shard in self.missing]) if is_over else []
        return lines + self.captions.warnings()


def reconcile(folder: Folder, shards: Sequence[Shard], state: OutputState) -> Reconciliation:
    """Compare the listed shards with the finished files."""
    names = [shard.name for shard in shards]
    summaries, unkept = load_summaries(folder, state, [name for name in names if name in state.finished])
    missing = tuple(name for name in names if name not in state.finished)
    return Reconciliation(len(names), tuple(summaries), missing, unkept)


def compare_input(folder: Folder, run: Run, inputs: Sequence[str] = ()) -> InputChanges:
    """Compare the shards of a run with what its input holds now.

    Args:
        inputs: the inputs of the run with their passwords and options; default: as they are stored.

    Raises:
        InputError, OSError: the input cannot be listed.
    """
    wanted, limit = run.settings.get("format", "auto"), run.settings.get("limit")
    patterns = Patterns(run.settings.get("include", ()), run.settings.get("exclude", ()))
    listed = list_files(inputs or run.inputs, wanted, run.shards, patterns, run.inputs)

    def content_of(shard: str) -> str | None:
        summary = find_summary(folder, shard)
        return None if summary is None else summary.content

    generations = {shard.name: shard.generation for shard in run.shards if shard.generation}
    reports = scan_output(folder, generations, FRAGMENTS).shard_reports
    known_changed = {shard for shard, name in reports.items() if is_report_of_change(name)}
    changes = find_changes(run.shards, listed, content_of, known_changed)
    return changes if limit is None else replace(changes, new=NO_FILES)


def _shorten(lines: list[str]) -> list[str]:
    more = len(lines) - MAX_NAMED
    return lines[:MAX_NAMED] + ([f"... and {more:,} more"] if more > 0 else [])
