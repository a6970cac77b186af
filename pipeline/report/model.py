"""The report of a run as a value: everything that the summary lines and the HTML page show."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.attempts.attempt import Attempts
from pipeline.ledger.reconcile import Reconciliation
from pipeline.ledger.run_record import Run
from pipeline.report.pace import attempt_lines
from pipeline.report.statistics import Statistics
from pipeline.report.thumbnails import RowAddress

MAX_LINES = 5
"""Reasons and captions that the summary lists one by one."""


@dataclass(frozen=True)
class Report:
    """What one run produced."""

    output: str
    """URI of the output folder, without secrets."""
    run: Run
    reconciliation: Reconciliation
    statistics: Statistics
    samples: list[dict[str, Any]]
    """Output rows at equal distances over the whole output."""
    thumbnails: Mapping[RowAddress, bytes]
    """JPEG files for some of the samples."""
    attempts: Attempts

    def lines(self) -> Iterator[str]:
        """Yield the lines of the summary for the terminal."""
        statistics = self.statistics
        yield from self.reconciliation.lines(is_over=not self.reconciliation.missing)
        yield from attempt_lines(self.attempts)
        reasons = statistics.most_frequent_reasons()
        for (status, reason), rows in reasons[:MAX_LINES]:
            yield f"{rows.count:,} {status}: {reason} (for example {rows.examples[0]})"
        if len(reasons) > MAX_LINES:
            yield f"... and {len(reasons) - MAX_LINES:,} more reasons"
        for flag, rows in sorted(statistics.flags.items()):
            yield f"{rows.count:,} flagged {flag} (for example {', '.join(rows.examples)})"
        for text, count in statistics.captions.top(MAX_LINES):
            yield f"{count:,} times: {text}"
