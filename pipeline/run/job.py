"""The captioning job: prepare, go on from what is there, run, commit, reconcile."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import pyarrow as pa

from blip2_actor import EngineBuilder, ModelInfo
from pipeline.inputs.formats import check_options
from pipeline.inputs.listing import list_shards
from pipeline.inputs.shards import Shard
from pipeline.ledger.commit import FINGERPRINT_KEY, RUN_KEY, commit_shard, output_name, read_summary
from pipeline.ledger.lease import Lease
from pipeline.ledger.ledger import (
    Run,
    State,
    begin_run,
    drop_markers,
    load_run,
    load_shard_report,
    scan_output,
    unfinished,
)
from pipeline.ledger.reconcile import Reconciliation, reconcile
from pipeline.ledger.retry import report_of, to_retry
from pipeline.progress import Console
from pipeline.run.cluster import connected, info_where_it_runs
from pipeline.schema import output_schema
from pipeline.settings.fingerprint import FingerprintMismatch
from pipeline.settings.from_dict import from_dict
from pipeline.settings.job_settings import CaptionSettings
from pipeline.settings.retry_settings import RetrySettings
from pipeline.storage.folder import Folder
from pipeline.storage.retrying import retry_on_oserror

COMMITS_AT_ONCE = 8


@dataclass(frozen=True)
class Job:
    """A job whose settings have been checked against model, input and output; nothing has been written."""

    settings: CaptionSettings
    engine: EngineBuilder
    info: ModelInfo
    folder: Folder
    run: Run
    is_new: bool
    """Whether the run has still to be begun in its folder."""
    is_retry: bool = False
    """Whether finished shards are gone over for rows that are not ok."""

    @property
    def metadata(self) -> dict[bytes, bytes]:
        """What the footer of every file says about the run."""
        fingerprint = self.run.fingerprint
        return {FINGERPRINT_KEY: fingerprint.digest.encode(), RUN_KEY: fingerprint.canonical.encode()}

    @property
    def empty_schema(self) -> pa.Schema:
        """Of the file of a shard without rows, whose kept columns are not known."""
        outputs = self.settings.outputs
        kept = (pa.field(name, pa.null()) for name in self.settings.reading.kept)
        return output_schema(kept, outputs.fields(self.info), outputs.caption)


def prepare(settings: CaptionSettings, engine: EngineBuilder | None = None) -> Job:
    """Check everything that can be checked without Ray; on a cluster, ask its machines what "auto" means.

    Raises:
        ValueError, OSError: the model is unknown, the input missing or empty, the output not writable
            or begun with other settings; the message says what to do.
    """
    engine = engine or settings.builder
    info = engine.info()
    settings.spec(engine).check(info)
    folder = Folder(settings.output)
    run = load_run(folder, settings.input)
    shards = run.shards if run is not None else _list(settings, folder)
    info = info_where_it_runs(engine, info, settings.placement)
    fingerprint = settings.fingerprint(info)
    if run is not None and settings.fork and fingerprint.differences(run.fingerprint):
        # Named by what is asked for, so that the same command goes on with the same fork.
        folder = Folder(folder.beside(fingerprint.digest[:8]))
        settings = dataclasses.replace(settings, output=folder.uri)
        run = load_run(folder, settings.input)
        shards = run.shards if run is not None else _list(settings, folder)
    if run is not None:
        fingerprint.require_same(run.fingerprint, str(folder))
        return Job(settings, engine, info, folder, run, is_new=False)
    return Job(settings, engine, info, folder, Run(fingerprint, settings.to_dict(), shards), is_new=True)


def prepare_retry(settings: RetrySettings, engine: EngineBuilder | None = None) -> Job:
    """Check that an earlier run can be tried again with the model it was made with.

    Raises:
        ValueError, OSError: there is no run, or its model is no longer the same.
    """
    folder = Folder(settings.output)
    run = load_run(folder, settings.input)
    if run is None:
        raise ValueError(
            f"output must be a folder with a run, got {folder} without one; name that of --output"
        )
    plain = dict(run.settings)
    if engine is not None:
        del plain["engine"]
    first = from_dict(CaptionSettings, plain)
    first = dataclasses.replace(
        first, output=settings.output, placement=settings.placement, limits=settings.limits(first.limits)
    )
    engine = engine or first.builder
    info = info_where_it_runs(engine, engine.info(), settings.placement)
    first.fingerprint(info).require_same(run.fingerprint, str(folder))
    return Job(first, engine, info, folder, run, is_new=False, is_retry=True)


def _list(settings: CaptionSettings, folder: Folder) -> tuple[Shard, ...]:
    """The shards of a run that is to begin in a folder."""
    shards = list_shards(settings.input, format=settings.format, limit=settings.limit)
    check_options(shards, settings.read_options)
    folder.require_writable()
    taken = scan_output(folder).finished & {shard.name for shard in shards}
    if taken:
        raise FingerprintMismatch(
            f"output must be empty or of an earlier run, got {folder} with {output_name(min(taken))} "
            "in it and no record of a run; give another --output or delete what is there"
        )
    return tuple(shards)


def run_job(job: Job, console: Console) -> Reconciliation:
    """Run what is left of a job and reconcile.

    Raises:
        OutputInUse: another driver works on this output.
        Stopped: a signal has stopped the run; what was finished is kept.
    """
    from pipeline.run.driver import Driver

    # A retry runs what has failed before: most of it may well fail again.
    driver = Driver(1.0 if job.is_retry else job.settings.max_failed_fraction, console)
    with Lease(job.folder, progress=driver.progress) as lease:
        if job.is_new:
            retry_on_oserror(lambda: begin_run(job.folder, job.run))
        retry_on_oserror(lambda: sweep(job, scan_output(job.folder)))
        find = to_retry if job.is_retry else unfinished
        found = retry_on_oserror(lambda: find(job.folder, job.run, scan_output(job.folder)))
        left = [progress for progress in found if not progress.is_complete]
        _announce(job, console, len(left))
        if left:
            with connected() as cluster:
                driver.run(job, left, cluster, lease)
        retry_on_oserror(lambda: sweep(job, scan_output(job.folder)))
        state = retry_on_oserror(lambda: scan_output(job.folder))
        retry_on_oserror(lambda: drop_markers(job.folder, job.run, state))
        return retry_on_oserror(lambda: reconcile(job.folder, job.run.shards, state.finished))


def sweep(job: Job, state: State) -> None:
    """Finish what a dead driver or a straggler has left: half-written files, shards that lack nothing."""
    for name in state.leftovers:
        job.folder.delete(name)
    reports = [p.report for p in unfinished(job.folder, job.run, state) if p.is_complete]
    for shard in sorted(state.finished & (state.fragments.keys() | state.shard_reports)):
        # A complete shard stays so; of a partial one, what lies there may be of a retry that will go on.
        reports.append(report_of(read_summary(job.folder, shard)) or load_shard_report(job.folder, shard))
    commit = partial(commit_shard, job.folder, metadata=job.metadata, empty_schema=job.empty_schema)
    with ThreadPoolExecutor(COMMITS_AT_ONCE) as pool:
        list(pool.map(commit, filter(None, reports)))


def _announce(job: Job, console: Console, num_left: int) -> None:
    total = len(job.run.shards)
    console.say(
        f"{job.info.model} ({job.info.dtype}, {job.info.image_size_px} px): {total:,} shards"
        + (f", {num_left:,} of them to do" if num_left < total else "")
        + f", output in {job.folder}"
    )
