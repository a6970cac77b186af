"""A run without Ray and without a model: shards are read, and their keys become rows of the output."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from blip2_actor import Status
from blip2_actor.testing import FakeEngineConfig
from pipeline.inputs.stamps import read_unchanged
from pipeline.ledger.reconcile import Reconciliation
from pipeline.run.job import Job
from pipeline.run.prepare import prepare, prepare_retry
from pipeline.schema import ROW_CONTRACT
from pipeline.settings.job_settings import CaptionSettings
from pipeline.settings.retry_settings import RetrySettings


def prepare_run(root: Path, **settings: Any) -> Job:
    """Prepare a run of the input `root / "in"` into `root / "out"`."""
    values = {"input": (str(root / "in"),), "output": str(root / "out")} | settings
    return prepare(CaptionSettings(**values), FakeEngineConfig())


def run(root: Path, max_tables: int | None = None, **settings: Any) -> Reconciliation:
    """Run a job, or only its first tables, as if it had been killed then."""
    return work(prepare_run(root, **settings), max_tables)


def retry(root: Path, **settings: Any) -> Reconciliation:
    """Retry a run; images that begin with "bad" have failed."""
    return work(prepare_of_retry(root, **settings))


def prepare_of_retry(root: Path, **settings: Any) -> Job:
    return prepare_retry(RetrySettings(output=str(root / "out"), **settings), FakeEngineConfig())


def work(
    job: Job, max_tables: int | None = None, after_table: Callable[[], object] | None = None
) -> Reconciliation:
    """Do with a job what `run_job` and the stages do.

    Args:
        max_tables: stop after this many tables.
        after_table: called after each table, while its shard is still being read.
    """
    ledger = job.ledger
    ledger.require_unrevised(job.run)
    if job.is_new:
        ledger.begin(job.run)
    elif job.is_revised:
        ledger.revise(job.run, job.redone)
    is_slice = job.run_slice is not None
    state = ledger.sweep(job.part, ledger.scan(), job.metadata, job.empty_schema, is_slice)
    if job.is_retry:
        left = ledger.to_retry(job.part, state, job.choice)
    else:
        left = ledger.unfinished(job.part, state)
    num_tables = 0
    for progress in left:
        if progress.is_complete:
            continue
        options = job.settings.read_options
        reader = read_unchanged(progress.work, options, job.run.kept)
        try:
            while num_tables != max_tables:
                ledger.write_fragment(_rows(next(reader), job.run.kept))
                num_tables += 1
                if after_table is not None:
                    after_table()
        except StopIteration as end:
            ledger.store_shard_report(end.value)
    state = ledger.sweep(job.part, ledger.scan(), job.metadata, job.empty_schema, is_slice)
    now = ledger.scan()
    assert (state.written, state.fragments, state.shard_reports, set(state.summaries), state.leftovers) == (
        now.written,
        now.fragments,
        now.shard_reports,
        set(now.summaries),
        now.leftovers,
    ), "the sweep knows what it has done without another listing"
    return ledger.reconcile(job.part, state)


def _rows(table: pa.Table, kept: pa.Schema | None) -> pa.Table:
    rows = []
    for row in table.select(["key", "shard", "row", "image"]).to_pylist():
        image = row.pop("image") or b""
        ok = not image.startswith(b"bad")
        status = Status.OK if ok else Status.UNDECODABLE
        caption = image.decode(errors="replace") if ok else None
        rows.append(row | {"caption": caption, "flags": [], "status": status.value})
    finished = pa.Table.from_pylist(rows, schema=ROW_CONTRACT)
    for field in kept or ():
        finished = finished.append_column(field, table[field.name])
    return finished


def captions(root: Path) -> dict[str, list[tuple[str, str | None]]]:
    """Return key and caption of every row, by shard."""
    return {
        str(path.relative_to(root / "out")).removesuffix(".parquet"): [
            (row["key"], row["caption"]) for row in pq.read_table(path).to_pylist()
        ]
        for path in sorted((root / "out").rglob("*.parquet"))
    }
