"""The report of a run as a value: everything that the summary lines, the HTML page and the JSON show."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.attempts.attempt import Attempts
from pipeline.ledger.reconcile import Reconciliation
from pipeline.ledger.run_record import Run
from pipeline.page.thumbnails import RowAddress
from pipeline.report.models import demo_warning
from pipeline.report.pace import attempt_lines
from pipeline.report.rows import one_line
from pipeline.report.statistics import Statistics
from pipeline.settings.from_dict import from_dict
from pipeline.settings.outputs import Outputs

MAX_LINES = 5
"""Reasons and captions that the summary lists one by one."""


@dataclass(frozen=True)
class Sample:
    """A row of the contact sheet, with all its columns but the vectors that the run has made."""

    row: Mapping[str, Any]
    groups: tuple[str, ...]
    """Names of the groups that chose it, of `samples.GROUPS`."""

    @property
    def address(self) -> RowAddress:
        return self.row["shard"], self.row["row"]


@dataclass(frozen=True)
class Report:
    """What one run produced."""

    output: str
    """URI of the output folder, without secrets."""
    run: Run
    reconciliation: Reconciliation
    statistics: Statistics
    samples: list[Sample]
    """The sampled rows, in the order of their groups."""
    norms: Mapping[str, Mapping[float, int]]
    """Number of sampled rows by the Euclidean norm of their vector, to two digits, for each vector column."""
    thumbnails: Mapping[RowAddress, bytes]
    """JPEG files for some of the samples."""
    max_thumbnails: int
    """How many were asked for."""
    attempts: Attempts

    @property
    def outputs(self) -> Outputs:
        return outputs_of(self.run)

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the models that the run loaded."""
        outputs, model = self.outputs, str(self.run.settings["engine"]["model"])
        if outputs.score_model is None:
            return (model,)
        return (outputs.score_model,) if outputs.only_matches else (model, outputs.score_model)

    @property
    def warnings(self) -> list[str]:
        """Reasons to doubt the captions as a whole."""
        found = demo_warning(self.run)
        return [*([found] if found else []), *self.reconciliation.captions.warnings()]

    def lines(self) -> Iterator[str]:
        """Yield the lines of the summary for the terminal."""
        statistics = self.statistics
        warning = demo_warning(self.run)
        if warning:
            yield warning
        yield from self.reconciliation.lines(is_over=not self.reconciliation.missing)
        yield from attempt_lines(self.attempts)
        yield from self.run.unread.lines()
        reasons = statistics.most_frequent_reasons()
        for (status, reason), rows in reasons[:MAX_LINES]:
            yield f"{rows.count:,} {status}: {one_line(reason)} (for example {one_line(rows.examples[0])})"
        if len(reasons) > MAX_LINES:
            yield f"... and {len(reasons) - MAX_LINES:,} more reasons"
        for flag, rows in sorted(statistics.flags.items()):
            yield f"{rows.count:,} flagged {flag} (for example {', '.join(map(one_line, rows.examples))})"
        for text, count in statistics.captions.top(MAX_LINES):
            yield f"{count:,} times: {one_line(text)}"


def outputs_of(run: Run) -> Outputs:
    return from_dict(Outputs, run.settings.get("outputs", {}))
