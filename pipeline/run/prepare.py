"""Prepare a job: check everything that can be checked before Ray starts and anything is written."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

import pyarrow as pa

from blip2_actor import EngineBuilder, EngineConfig, ModelInfo
from pipeline.column_names import SCHEMA_VERSION
from pipeline.endpoint.settings import EndpointConfig
from pipeline.errors import InputError
from pipeline.inputs.changes import add_new, redo
from pipeline.inputs.find_files import same_place
from pipeline.inputs.formats import check_options
from pipeline.inputs.image_kinds import notes_on_formats
from pipeline.inputs.listing import Listing, list_input
from pipeline.ledger.fragments import names_of_shard
from pipeline.ledger.layout import output_name
from pipeline.ledger.ledger import Ledger
from pipeline.ledger.retry import RowChoice, read_keys
from pipeline.ledger.run_record import Run, begin_run
from pipeline.placement.first_worker import (
    as_answered,
    describe_without_device,
    leaves_dtype_open,
    leaves_quantization_open,
)
from pipeline.placement.storage_check import refuse_relative
from pipeline.run.cluster import is_cluster
from pipeline.run.hub_commit import pinned, with_pinned_scores, without_idle_revision
from pipeline.run.job import Job
from pipeline.settings.deadline import stop_time
from pipeline.settings.fingerprint import FingerprintMismatch
from pipeline.settings.from_dict import from_dict
from pipeline.settings.job_settings import CaptionSettings
from pipeline.settings.placement import Placement
from pipeline.settings.retry_settings import RetrySettings
from pipeline.storage.folder import Folder


def prepare(settings: CaptionSettings, engine: EngineBuilder | None = None) -> Job:
    """Check a job, and list its input unless its run has begun. Ray is not asked.

    Raises:
        ValueError, OSError: the model is unknown, the input is missing or empty, the output cannot be written
            or was begun with other settings; the message says what to do.
    """
    stop_at = stop_time(settings.deadline)
    # Every new settings object checks its deadline, which may pass meanwhile.
    settings = dataclasses.replace(settings, deadline=None)
    refuse_relative("input", settings.input)
    refuse_relative("output", [settings.output])
    settings.serving.check(settings.engine, settings.outputs, settings.placement)
    ledger = Ledger(Folder(settings.output))
    run = ledger.load(settings.input)
    if run is not None and run.predates_generation_config:
        settings = settings.without_generation_config()
    new = _list_input(settings) if run is None else None  # before the model, whose imports take seconds
    given, wanted = settings, engine or settings.builder
    engine, info = _describe(wanted, run)
    resolved = settings.resolved(info)
    settings = with_pinned_scores(resolved, engine, info, run)
    settings.spec(engine).check(info)
    if run is not None and settings.fork and not _continues(run, settings, info):
        output = _find_fork(resolved, ledger, _in_any_dtype(wanted))
        fork = prepare(dataclasses.replace(given, output=output, fork=False), wanted)
        return dataclasses.replace(fork, stop_at=stop_at)
    if run is None:
        assert new is not None
        listing, kept = new
        _check_output(ledger, listing)
        run = begin_run(settings.fingerprint(info), resolved, listing, kept)
        run = dataclasses.replace(run, quantization=getattr(engine, "quantization_choice", None))
        return Job(
            settings,
            engine,
            info,
            ledger.of(run),
            run,
            is_new=True,
            asks_worker=(is_cluster() and leaves_dtype_open(engine)) or leaves_quantization_open(engine),
            stop_at=stop_at,
            notes=(*listing.notes, *notes_on_formats(listing.shards)),
        )
    settings = settings.in_version(run.schema_version)
    run.require_same(settings.fingerprint(info), settings.input, str(ledger), settings.add_new)
    _check_begun_output(ledger)
    job = Job(settings, engine, info, ledger, run, is_new=False, stop_at=stop_at)
    return _with_current_input(job, settings.input, settings.redo_changed, settings.add_new)


def prepare_retry(settings: RetrySettings, engine: EngineBuilder | None = None) -> Job:
    """Check that the rows of an earlier run can be run again, with the model that made it.

    Raises:
        ValueError, OSError: there is no run, its model is no longer the same, or its endpoint cannot make the
            rows; the message says what to do.
    """
    stop_at = stop_time(settings.deadline)
    refuse_relative("output", [settings.output])
    keys = None if settings.keys is None else read_keys(settings.keys)
    choice = RowChoice(frozenset(settings.status), keys)
    ledger = Ledger(Folder(settings.output))
    run = ledger.require_run(settings.input)
    stored = dict(run.settings)
    if engine is not None:
        del stored["engine"]
    first = from_dict(CaptionSettings, stored)
    settings.serving.check(EngineConfig(), first.outputs, settings.placement.apply(Placement()))
    first = dataclasses.replace(
        first.in_version(run.schema_version),
        output=settings.output,
        outputs=settings.outputs(first.outputs),
        placement=settings.placement.apply(settings.serving.of_placement(first.placement)),
        limits=settings.limits(first.limits),
        fetching=settings.fetching(first.fetching),
        serving=settings.serving,
        **settings.fractions,
    )
    if run.predates_generation_config:
        first = first.without_generation_config()
    engine, info = _describe(engine or first.builder, run)
    first = with_pinned_scores(first, engine, info, run)
    run.require_same(first.fingerprint(info), run.inputs, str(ledger))
    _check_begun_output(ledger)
    job = Job(first, engine, info, ledger, run, is_new=False, stop_at=stop_at, is_retry=True, choice=choice)
    return _with_current_input(job, settings.input, settings.redo_changed)


def _describe(engine: EngineBuilder, run: Run | None) -> tuple[EngineBuilder, ModelInfo]:
    """Return the engine, with the device and commit that its run has recorded, and its model.

    The driver of a cluster does not caption, and may lack the device.
    """
    if isinstance(engine, EndpointConfig):
        engine = engine.with_info()
    if run is not None:
        engine = as_answered(engine, run.fingerprint.parts["dtype"], run.quantization)
        engine = without_idle_revision(engine)
        engine = pinned(engine, run.commit_of(getattr(engine, "model", None)))
    info = describe_without_device(engine) if is_cluster() else engine.info()
    return pinned(engine, info.digest.partition("+")[0]), info


def _in_any_dtype(engine: EngineBuilder) -> list[ModelInfo]:
    """Return the model as this machine describes it, and in the other dtypes if the dtype is left open."""
    _, info = _describe(engine, None)
    others = ("float32", "bfloat16", "float16") if leaves_dtype_open(engine) else ()
    return [info, *(dataclasses.replace(info, dtype=dtype) for dtype in others if dtype != info.dtype)]


def _continues(run: Run, settings: CaptionSettings, info: ModelInfo) -> bool:
    return run.continues(settings.in_version(run.schema_version).fingerprint(info), settings.input)


def _find_fork(settings: CaptionSettings, ledger: Ledger, infos: Sequence[ModelInfo]) -> str:
    """Return the URI of the fork that the same command began before, or of a new one.

    It is named by its fingerprint, so that the same command resumes the same fork.

    Args:
        infos: the model in each dtype that the fork may have; a new one is named by the first.
    """
    uris = [
        ledger.folder.sibling_uri(settings.in_version(version).fingerprint(info).digest[:8])
        for info in infos
        for version in range(SCHEMA_VERSION, 0, -1)
    ]
    return next((uri for uri in uris if Ledger(Folder(uri)).load(settings.input) is not None), uris[0])


def _with_current_input(job: Job, inputs: Sequence[str], redo_changed: bool, takes_new: bool = False) -> Job:
    """Return a job of an existing run, with the shards that its input has now.

    Raises:
        InputError: a shard has changed, and `redo_changed` is False; or the input cannot be listed, and
            changed shards are to be made again or new files taken.
        ValueError: the job is a retry, and the run is not finished.
    """
    ledger = job.ledger.of(job.run)
    if job.is_retry:
        ledger.require_finished(job.run)
    try:
        changes = ledger.compare_input(job.run, inputs)
    except (InputError, OSError) as error:
        note = f"the input cannot be compared with that of the run: {error}"
        if redo_changed or takes_new:
            flag = "--redo-changed" if redo_changed else "--add-new"
            raise InputError(f"{note}; restore the input, or leave out {flag} to go on without it") from error
        return dataclasses.replace(job, ledger=ledger, notes=(note,))
    # A retry reads partial shards again: all rows of a repaired file are made again.
    if not (redo_changed or (job.is_retry and ledger.are_partial(changes.changed))):
        changes.require_unchanged()
    shards, redone = redo(changes, job.settings.read_options)
    if takes_new:
        shards = add_new(shards, changes.new, job.settings.read_options)
    run = _with_hosts(job.run.with_shards(shards, inputs if takes_new else ()), job.settings)
    known = set(job.run.shards)
    added = [shard for shard in shards if shard not in known]
    if added:
        check_options(added, job.settings.read_options)
    ledger.folder.require_names(name for shard in added for name in names_of_shard(shard))
    return dataclasses.replace(
        job,
        ledger=ledger.of(run),
        run=run,
        redone=redone,
        # Slices do not revise: they would write one record at the same time, and lose only stamps and hosts.
        is_revised=run != job.run and job.run_slice is None,
        notes=tuple(changes.lines(is_start=True, is_added=takes_new)),
    )


def _with_hosts(run: Run, settings: CaptionSettings) -> Run:
    """Return a run that knows the private hosts of this start: export and report read their images again."""
    stored = run.settings.get("fetching", {})
    known = stored.get("allow_private_hosts", ())
    hosts = [*dict.fromkeys((*known, *settings.fetching.allow_private_hosts))]
    if len(hosts) == len(known):
        return run
    fetching = {**stored, "allow_private_hosts": hosts}
    return dataclasses.replace(run, settings={**run.settings, "fetching": fetching})


def _list_input(settings: CaptionSettings) -> tuple[Listing, pa.Schema]:
    """Return the shards of a run that is to begin in this output, and its kept columns."""
    listing = list_input(
        settings.input,
        format=settings.format,
        limit=settings.limit,
        options=settings.read_options,
        patterns=settings.patterns,
    )
    here = same_place(settings.output, os.getcwd())
    if here in {same_place(shard.root, "/") for shard in listing.shards}:
        raise ValueError(
            f"output must be another folder than that of the input, got {here}; give another --output"
        )
    return listing, check_options(listing.shards, settings.read_options)


def _check_output(ledger: Ledger, listing: Listing) -> None:
    """Refuse an output in which no run on these shards can begin."""
    ledger.folder.require_names(name for shard in listing.shards for name in names_of_shard(shard))
    ledger.folder.require_writable()
    taken = ledger.scan().finished & {shard.name for shard in listing.shards}
    if taken and ledger.load() is None:  # Otherwise the driver of another slice has begun the run.
        raise FingerprintMismatch(
            f"output must be empty or of an earlier run, got {ledger} with {output_name(min(taken))} "
            "in it and no record of a run; give another --output or delete what is there"
        )


def _check_begun_output(ledger: Ledger) -> None:
    """Refuse an output in which a heartbeat cannot replace the one before; older versions accepted it."""
    if ledger.folder.moves_files:
        ledger.folder.require_writable()
