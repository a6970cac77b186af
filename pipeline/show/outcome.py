"""What a run says at its end: a few captions, failed rows, where the output is, and what to do with it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from blip2_actor import Status
from pipeline.inputs.evenly_spaced import evenly_spaced
from pipeline.ledger.reconcile import Reconciliation
from pipeline.report.rows import one_line, short_value, tables_of
from pipeline.storage.folder import Folder

NUM_CAPTIONS = 3
MAX_FAILED = 5


def outcome_lines(folder: Folder, done: Reconciliation) -> list[str]:
    """Return the lines that end a run.

    A few row groups of the output are read. If they cannot be, the lines say so, and nothing is raised: the
    work of the run is done.

    Args:
        folder: the output.
        done: the reconciliation of the run.
    """
    lines: list[str] = []
    try:
        lines += _captions(folder, done)
        lines += _failed(folder, done)
    except (OSError, pa.ArrowException) as error:
        lines.append(f"the output cannot be read back now: {error}")
    return [*lines, f"output: {folder}", *_next_commands(folder, done)]


def _captions(folder: Folder, done: Reconciliation) -> Iterator[str]:
    """Yield the first caption of a few shards from all over the output."""
    captioned = [summary.shard for summary in done.summaries if summary.by_status.get(Status.OK.value)]
    for shard in evenly_spaced(captioned, NUM_CAPTIONS):
        for row in _rows(folder, shard, ["key", "status", "caption"], is_ok=True):
            if row.get("caption") is not None:
                yield f"  {one_line(row['key'])}: {short_value(row['caption'])}"
            break


def _failed(folder: Folder, done: Reconciliation) -> Iterator[str]:
    """Yield the first failed rows with their reasons."""
    num_left = MAX_FAILED
    for summary in done.summaries:
        if not num_left:
            break
        if not summary.num_failed:
            continue
        for row in _rows(folder, summary.shard, ["key", "status", "error"], is_ok=False):
            yield f"  {one_line(row['key'])}: {row['status']}: {short_value(row['error'] or '')}"
            num_left -= 1
            if not num_left:
                break
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
