"""Prepare a job: check everything that can be checked before Ray starts and anything is written."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime

from blip2_actor import EngineBuilder
from pipeline.inputs.formats import check_options
from pipeline.inputs.listing import list_shards
from pipeline.inputs.shards import Shard
from pipeline.ledger.fragments import names_of_shard
from pipeline.ledger.layout import output_name
from pipeline.ledger.ledger import Ledger
from pipeline.ledger.run_record import Run
from pipeline.run.cluster import info_where_it_runs
from pipeline.run.job import Job
from pipeline.settings.deadline import stop_time
from pipeline.settings.fingerprint import FingerprintMismatch
from pipeline.settings.from_dict import from_dict
from pipeline.settings.job_settings import CaptionSettings
from pipeline.settings.retry_settings import RetrySettings
from pipeline.storage.folder import Folder


def prepare(settings: CaptionSettings, engine: EngineBuilder | None = None) -> Job:
    """Check a job, and list its input unless its run has begun.

    Ray is only asked on a cluster, for what "auto" means on its machines.

    Raises:
        ValueError, OSError: the model is unknown, the input is missing or empty, the output cannot be written
            or was begun with other settings; the message says what to do.
        RayStartFailed: the cluster cannot be reached.
    """
    stop_at = _stop_at(settings.deadline)
    engine = engine or settings.builder
    info = engine.info()
    settings.spec(engine).check(info)
    ledger = Ledger(Folder(settings.output))
    run = ledger.load(settings.input)
    shards = run.shards if run is not None else _list_shards(settings, ledger)
    info = info_where_it_runs(engine, info, settings.placement)
    fingerprint = settings.fingerprint(info)
    if run is not None and settings.fork and fingerprint.differences(run.fingerprint):
        # The folder is named by the new fingerprint, so that the same command resumes the same fork.
        settings = dataclasses.replace(settings, output=ledger.folder.sibling_uri(fingerprint.digest[:8]))
        ledger = Ledger(Folder(settings.output))
        run = ledger.load(settings.input)
        shards = run.shards if run is not None else _list_shards(settings, ledger)
    if run is not None:
        fingerprint.require_same(run.fingerprint, str(ledger))
        return Job(settings, engine, info, ledger, run, is_new=False, stop_at=stop_at)
    run = Run(fingerprint, settings.to_dict(), shards)
    return Job(settings, engine, info, ledger, run, is_new=True, stop_at=stop_at)


def prepare_retry(settings: RetrySettings, engine: EngineBuilder | None = None) -> Job:
    """Check that the rows of an earlier run can be run again, with the model that made it.

    Raises:
        ValueError, OSError: there is no run, or its model is no longer the same.
        RayStartFailed: the cluster cannot be reached.
    """
    stop_at = _stop_at(settings.deadline)
    ledger = Ledger(Folder(settings.output))
    run = ledger.require_run(settings.input)
    stored = dict(run.settings)
    if engine is not None:
        del stored["engine"]
    first = from_dict(CaptionSettings, stored)
    first = dataclasses.replace(
        first, output=settings.output, placement=settings.placement, limits=settings.limits(first.limits)
    )
    engine = engine or first.builder
    info = info_where_it_runs(engine, engine.info(), settings.placement)
    first.fingerprint(info).require_same(run.fingerprint, str(ledger))
    return Job(first, engine, info, ledger, run, is_new=False, stop_at=stop_at, is_retry=True)


def _stop_at(deadline: str | None) -> datetime | None:
    return None if deadline is None else stop_time(deadline, datetime.now(UTC))


def _list_shards(settings: CaptionSettings, ledger: Ledger) -> tuple[Shard, ...]:
    """Return the shards of a run that is to begin in this output."""
    shards = list_shards(settings.input, format=settings.format, limit=settings.limit)
    check_options(shards, settings.read_options)
    ledger.folder.require_names(name for shard in shards for name in names_of_shard(shard.name))
    ledger.folder.require_writable()
    taken = ledger.scan().finished & {shard.name for shard in shards}
    if taken:
        raise FingerprintMismatch(
            f"output must be empty or of an earlier run, got {ledger} with {output_name(min(taken))} "
            "in it and no record of a run; give another --output or delete what is there"
        )
    return tuple(shards)
