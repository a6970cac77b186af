"""The command `blip2 report`: read an output once, then print a summary and write an HTML page.

The output alone is read: the ledger, the footers and the rows of the finished files, one row group at a
time. Only thumbnails need the input, which is read again for the sampled rows. The command needs no Ray
and no model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.exit_status import before_work, errors_to_exit_status
from pipeline.inputs.evenly_spaced import evenly_spaced
from pipeline.ledger.layout import RUN_FILE, is_result, output_name
from pipeline.ledger.ledger import Ledger
from pipeline.ledger.run_record import Run
from pipeline.progress import Console
from pipeline.report.html import render_page
from pipeline.report.model import Report
from pipeline.report.statistics import COUNTED_COLUMNS, Statistics
from pipeline.report.thumbnails import RowAddress, make_thumbnails
from pipeline.settings.from_dict import from_dict
from pipeline.settings.job_settings import CaptionSettings
from pipeline.settings.report_settings import ReportSettings
from pipeline.storage.folder import Folder

NUM_SAMPLES = 24
"""Rows that the page shows one by one."""


@errors_to_exit_status
def report(settings: ReportSettings) -> int:
    """Print a summary, and write the page if `--html` names a file."""
    console = Console()
    with before_work(type(settings)):
        found = make_report(settings.output, settings.thumbnails if settings.html else 0)
    for line in found.lines():
        console.say(line)
    if settings.html:
        Path(settings.html).write_text(render_page(found), encoding="utf-8")
        console.say(f"page: {settings.html}, with {len(found.thumbnails):,} thumbnails read from the input")
    return 0


def make_report(uri: str, num_thumbnails: int = 0) -> Report:
    """Read an output folder once.

    Args:
        uri: the output folder.
        num_thumbnails: maximum number of thumbnails; 0 leaves the input alone.

    Raises:
        ValueError: the folder holds no run, or the run has not finished a shard yet.
    """
    folder = Folder(uri)
    ledger = Ledger(folder)
    run = ledger.require_run()
    done = ledger.reconcile(run, ledger.of(run).scan())
    if not done.summaries:
        raise ValueError(f"{folder} has no finished shard yet; run the report again later")
    statistics, samples = Statistics(), list[dict[str, Any]]()
    sampled = evenly_spaced(range(done.num_rows), NUM_SAMPLES)
    for shard in done.summaries:
        for rows in _read_counted(folder, shard.shard, sampled, statistics.num_rows, samples):
            statistics.add(rows)
    changes = dict(folder.changes())
    written = [changed for name, changed in changes.items() if is_result(name)]
    return Report(
        output=str(folder),
        run=run,
        reconciliation=done,
        statistics=statistics,
        samples=samples,
        thumbnails=_thumbnails(run, evenly_spaced(samples, num_thumbnails)) if num_thumbnails else {},
        begun=changes[RUN_FILE],
        last_written=max(written),
    )


def _read_counted(
    folder: Folder, shard: str, sampled: list[int], start: int, samples: list[dict[str, Any]]
) -> Iterator[pa.Table]:
    """Yield the counted columns of one finished file, a row group at a time.

    Args:
        sampled: numbers of the rows to append to `samples` with all their columns; the numbers run over
            all files of the output.
        start: number of the file's first row.
        samples: the list to append to.
    """
    with folder.open(output_name(shard)) as file:
        parquet = pq.ParquetFile(file)
        columns = [name for name in COUNTED_COLUMNS if name in parquet.schema_arrow.names]
        for group in range(parquet.num_row_groups):
            rows = parquet.read_row_group(group, columns=columns)
            positions = [row - start for row in sampled if start <= row < start + len(rows)]
            if positions:
                samples += parquet.read_row_group(group).take(positions).to_pylist()
            start += len(rows)
            yield rows


def _thumbnails(run: Run, rows: list[dict[str, Any]]) -> dict[RowAddress, bytes]:
    settings = from_dict(CaptionSettings, run.settings)
    options = settings.in_version(run.schema_version).read_options.images_only
    shards = {shard.name: shard for shard in run.shards}
    return make_thumbnails(rows, shards, replace(options, table_rows=1), settings.limits, settings.fetching)
