"""What a run says at its end: rows by status, captions, failed rows, its exit status, what to do next."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from decimal import Decimal
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from blip2_actor import Status
from pipeline.inputs.evenly_spaced import evenly_spaced
from pipeline.ledger.reconcile import Reconciliation
from pipeline.progress import Console, count
from pipeline.report.rows import one_line, short_value, tables_of
from pipeline.run.job import Job
from pipeline.settings.job_settings import CaptionSettings
from pipeline.storage.folder import Folder

NUM_CAPTIONS = 3
MAX_FAILED = 5


def tell_outcome(console: Console, job: Job, done: Reconciliation) -> int:
    """Say how a run has ended, and return its exit status.

    A few row groups of the output are read. If they cannot be, a line says so, and nothing is raised: the
    work of the run is done.
    """
    folder, settings = job.ledger.folder, job.settings
    status = done.exit_status(settings.max_failed_fraction, settings.max_flagged_fraction)
    reason = _reason(done, settings)
    say = console.result if status else console.say
    for line in done.lines():
        say(line)
    try:
        for line in _captions(folder, done):
            console.say(line)
        for line in _failed(folder, done):
            console.fail(line) if status else console.say(line)
    except (OSError, pa.ArrowException) as error:
        console.warn(f"the output cannot be read back now: {error}")
    if reason is not None:
        console.fail(f"exit status {status}: {reason}")
    for line in (f"output: {folder}", *_next_commands(folder, done)):
        say(line)
    console.event(
        "end",
        exit_status=status,
        reason=reason,
        output=str(folder),
        num_rows=done.num_rows,
        by_status=dict(done.by_status),
        num_shards=done.num_shards,
        num_missing=len(done.missing),
        num_partial=len(done.partial),
    )
    return status


def _reason(done: Reconciliation, settings: CaptionSettings) -> str | None:
    """Return why the exit status is not 0, or None if it is."""
    failed, flagged = done.failed_fraction, done.captions.flagged_fraction
    if done.missing:
        have = "has" if len(done.missing) == 1 else "have"
        return f"{count(len(done.missing), 'shard')} of {done.num_shards:,} {have} no file"
    if done.num_rows != sum(done.by_status.values()):
        return "the rows of the files and their statuses do not add up"
    if failed > settings.max_failed_fraction:
        limit = f"--max-failed-fraction {settings.max_failed_fraction:g}"
        lost = "; a partial shard counts as one failed row" if done.partial else ""
        return f"{_percent(failed)} of the rows failed, more than {limit} allows{lost}"
    if flagged > settings.max_flagged_fraction:
        limit = f"--max-flagged-fraction {settings.max_flagged_fraction:g}"
        return f"{_percent(flagged)} of the captions are flagged, more than {limit} allows"
    return None


def _percent(fraction: float) -> str:
    """Format a fraction with two digits, but not two zeros; 100% is all, and nearly all is 99.99%."""
    percent = 100 * fraction if fraction == 1 else min(100 * fraction, 99.99)
    text = f"{percent:.2f}" if percent >= 0.01 else f"{Decimal(f'{percent:.2g}'):f}"
    return f"{text.rstrip('0').rstrip('.')}%"


def _captions(folder: Folder, done: Reconciliation) -> Iterator[str]:
    """Yield the first captions of a few shards from all over the output, the same number of each."""
    captioned = [summary.shard for summary in done.summaries if summary.by_status.get(Status.OK.value)]
    shards = evenly_spaced(captioned, NUM_CAPTIONS)
    for shard in shards:
        rows = _rows(folder, shard, ["key", "status", "caption"], is_ok=True)
        for row in islice(rows, NUM_CAPTIONS // len(shards)):
            if row.get("caption") is not None:
                yield f"  {one_line(row['key'])}: {short_value(row['caption'])}"


def _failed(folder: Folder, done: Reconciliation) -> Iterator[str]:
    """Yield the first failed rows with their reasons."""
    failed = (
        row
        for summary in done.summaries
        if summary.num_failed
        for row in _rows(folder, summary.shard, ["key", "status", "error"], is_ok=False)
    )
    for row in islice(failed, MAX_FAILED):
        yield f"  {one_line(row['key'])}: {row['status']}: {short_value(row['error'] or '')}"
    if done.num_failed > MAX_FAILED:
        yield f"  ... and {done.num_failed - MAX_FAILED:,} more failed rows"


def _rows(folder: Folder, shard: str, columns: list[str], is_ok: bool) -> Iterator[dict[str, Any]]:
    for table in tables_of(folder, shard, columns):
        rows = table.filter((pc.equal if is_ok else pc.not_equal)(table["status"], Status.OK.value))
        yield from rows.slice(0, MAX_FAILED).to_pylist()


def _next_commands(folder: Folder, done: Reconciliation) -> Iterator[str]:
    output = f"--output {shlex.quote(str(folder))}"
    if done.missing:
        yield "next: run the same command again, which goes on with what is missing"
        return
    yield f"next: blip2 show {output}" + (" --status not_ok" if done.num_failed else "")
    yield f"      blip2 report {output} --html report.html"
    if done.num_failed or done.partial:
        yield f"      blip2 retry {output}"
