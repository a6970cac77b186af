"""`blip2 report`: what a run has made, from its output alone, as lines and as one page."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.cli.commands import errors_to_exit_status
from pipeline.inputs.reader import ReadOptions
from pipeline.inputs.size_estimate import spread
from pipeline.ledger.layout import RUN_FILE, is_result, output_name
from pipeline.ledger.ledger import Ledger
from pipeline.ledger.reconcile import Reconciliation
from pipeline.ledger.run_record import Run
from pipeline.progress import Console, duration
from pipeline.report.html import page
from pipeline.report.statistics import COUNTED, Statistics
from pipeline.report.thumbnails import Place, thumbnails
from pipeline.settings.settings import CaptionSettings, ReportSettings, from_dict
from pipeline.storage.folder import Folder

NUM_SAMPLES = 24
MAX_LINES = 5


@dataclass(frozen=True)
class Report:
    """Everything that the page shows."""

    output: str
    run: Run
    reconciliation: Reconciliation
    statistics: Statistics
    samples: list[dict[str, Any]]
    """Rows at even distances over the whole output."""
    pictures: Mapping[Place, bytes]
    """JPEGs of samples."""
    begun: datetime
    last_written: datetime

    @property
    def seconds(self) -> float:
        """From the beginning of the run to its last file, pauses included."""
        return (self.last_written - self.begun).total_seconds()

    @property
    def pace(self) -> str:
        """When the run was at work, and how fast."""
        rate = self.statistics.num_rows / self.seconds if self.seconds > 0 else 0.0
        return (
            f"begun {_clock(self.begun)}, last file {_clock(self.last_written)}: "
            f"{self.statistics.num_rows:,} rows in {duration(self.seconds)}, {rate:,.1f}/s, pauses included"
        )


@errors_to_exit_status
def report(settings: ReportSettings) -> int:
    """Print a summary, and write the page where one is asked for."""
    console = Console()
    found = make_report(settings.output, settings.thumbnails if settings.html else 0)
    for line in lines(found):
        console.say(line)
    if settings.html:
        Path(settings.html).write_text(page(found), encoding="utf-8")
        console.say(f"page: {settings.html}, {len(found.pictures):,} pictures read again from the input")
    return 0


def make_report(uri: str, num_thumbnails: int = 0) -> Report:
    """Read an output once.

    Raises:
        ValueError: there is no run, or nothing of it is finished.
    """
    folder = Folder(uri)
    ledger = Ledger(folder)
    run = ledger.require_run()
    done = ledger.reconcile(run, ledger.scan())
    if not done.summaries:
        raise ValueError(f"output must have finished shards, got none in {folder}; look again later")
    statistics, samples = Statistics(), list[dict[str, Any]]()
    wanted = spread(range(done.num_rows), NUM_SAMPLES)
    for shard in done.summaries:
        for rows in _tables(folder, shard.shard, wanted, statistics.num_rows, samples):
            statistics.add(rows)
    changes = dict(folder.changes())
    written = [changed for name, changed in changes.items() if is_result(name)]
    return Report(
        output=str(folder),
        run=run,
        reconciliation=done,
        statistics=statistics,
        samples=samples,
        pictures=_pictures(run, spread(samples, num_thumbnails)) if num_thumbnails else {},
        begun=changes[RUN_FILE],
        last_written=max(written),
    )


def lines(found: Report) -> Iterator[str]:
    """The summary for people."""
    yield from found.reconciliation.lines(is_over=not found.reconciliation.missing)
    yield found.pace
    reasons = sorted(found.statistics.reasons.items(), key=lambda item: -item[1].count)
    for (status, reason), kind in reasons[:MAX_LINES]:
        yield f"{kind.count:,} {status}: {reason} (such as {kind.examples[0]})"
    if len(reasons) > MAX_LINES:
        yield f"... and {len(reasons) - MAX_LINES:,} more reasons"
    for flag, kind in sorted(found.statistics.flags.items()):
        yield f"{kind.count:,} flagged {flag} (such as {', '.join(kind.examples)})"
    for text, count in found.statistics.captions.top(MAX_LINES):
        yield f"{count:,} times: {text}"


def _tables(
    folder: Folder, shard: str, wanted: list[int], start: int, samples: list[dict[str, Any]]
) -> Iterator[pa.Table]:
    """What is counted of a file, a row group at a time; wanted rows, numbered over all files, are put by."""
    with folder.open(output_name(shard)) as file:
        parquet = pq.ParquetFile(file)
        columns = [name for name in COUNTED if name in parquet.schema_arrow.names]
        for group in range(parquet.num_row_groups):
            rows = parquet.read_row_group(group, columns=columns)
            positions = [row - start for row in wanted if start <= row < start + len(rows)]
            if positions:
                samples += parquet.read_row_group(group).take(positions).to_pylist()
            start += len(rows)
            yield rows


def _pictures(run: Run, rows: list[dict[str, Any]]) -> dict[Place, bytes]:
    settings = from_dict(CaptionSettings, run.settings)
    options = ReadOptions(
        image_column=settings.reading.image_column,
        max_image_bytes=settings.limits.max_file_bytes,
        table_rows=1,
    )
    return thumbnails(rows, {shard.name: shard for shard in run.shards}, options, settings.limits)


def _clock(moment: datetime) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment.astimezone(UTC).timestamp()))
