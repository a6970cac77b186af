"""The report of a run as a value: everything that the summary lines and the HTML page show."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pipeline.ledger.reconcile import Reconciliation
from pipeline.ledger.run_record import Run
from pipeline.progress import duration
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
    begun: datetime
    last_written: datetime

    @property
    def seconds(self) -> float:
        """Seconds from the start of the run to its last file, pauses included."""
        return (self.last_written - self.begun).total_seconds()

    @property
    def pace(self) -> str:
        """When the run worked, and how fast, as one sentence."""
        rate = self.statistics.num_rows / self.seconds if self.seconds > 0 else 0.0
        return (
            f"started {_local_time(self.begun)}, last file {_local_time(self.last_written)}: "
            f"{self.statistics.num_rows:,} rows in {duration(self.seconds)}, {rate:,.1f}/s, pauses included"
        )

    def lines(self) -> Iterator[str]:
        """Yield the lines of the summary for the terminal."""
        statistics = self.statistics
        yield from self.reconciliation.lines(is_over=not self.reconciliation.missing)
        yield self.pace
        reasons = statistics.most_frequent_reasons()
        for (status, reason), rows in reasons[:MAX_LINES]:
            yield f"{rows.count:,} {status}: {reason} (for example {rows.examples[0]})"
        if len(reasons) > MAX_LINES:
            yield f"... and {len(reasons) - MAX_LINES:,} more reasons"
        for flag, rows in sorted(statistics.flags.items()):
            yield f"{rows.count:,} flagged {flag} (for example {', '.join(rows.examples)})"
        for text, count in statistics.captions.top(MAX_LINES):
            yield f"{count:,} times: {text}"


def _local_time(moment: datetime) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment.astimezone(UTC).timestamp()))
