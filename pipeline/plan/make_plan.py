"""Make a plan: list the input, read a sample, time each stage of the job on it in this process. No Ray."""

from __future__ import annotations

import dataclasses
import os

from blip2_actor import EngineBuilder, ModelInfo
from pipeline.attempts.store import read_attempts
from pipeline.inputs.formats import check_options
from pipeline.inputs.image_kinds import notes_on_formats
from pipeline.inputs.listing import list_input
from pipeline.inputs.size_estimate import estimate_size
from pipeline.plan.model import Plan
from pipeline.plan.sample import take_sample
from pipeline.plan.stage_costs import measure_stage_costs
from pipeline.settings.deadline import RESERVE, time_left
from pipeline.settings.plan_settings import AnyPlanSettings
from pipeline.storage.folder import Folder


def make_plan(settings: AnyPlanSettings, engine: EngineBuilder | None = None) -> Plan:
    """List the input, take a sample, and time the stages on it.

    Args:
        settings: the job, and the size of the sample.
        engine: used in place of the job's engine.

    Raises:
        ValueError, OSError: the job would raise it too, or no image of the sample can be decoded.
    """
    deadline = settings.deadline
    # Every new settings object checks its deadline, which may pass meanwhile.
    job = dataclasses.replace(settings, deadline=None).job()
    listing = list_input(
        job.input, format=job.format, limit=job.limit, options=job.read_options, patterns=job.patterns
    )
    shards = listing.shards
    check_options(shards, job.read_options)
    engine = engine or job.builder
    info = engine.info()
    job = job.resolved(info)
    job.spec(engine).check(info)
    sample = take_sample(shards, job.read_options, settings.sample)
    size = estimate_size(shards, job.limit, job.read_options)
    rows_per_shard = max(1, round(size.num_rows / size.num_shards))
    return Plan(
        settings=job,
        info=info,
        size_estimate=size,
        sample=sample,
        unread=listing.unread,
        notes=tuple(notes_on_formats(shards)),
        stage_costs=measure_stage_costs(job, engine, info, sample, rows_per_shard),
        num_cpus=_num_cpus(),
        num_accelerators=_num_accelerators(engine),
        price_per_hour=settings.price_per_hour,
        earlier_start_s=_earlier_start_s(settings.output, info),
        deadline=deadline,
        deadline_s=_deadline_s(deadline),
    )


def _deadline_s(deadline: str | None) -> float | None:
    """Return the seconds from now until a job must begin to stop; None without a deadline.

    The settings have accepted the deadline, which may be over since: they are below zero then.
    """
    return None if deadline is None else (time_left(deadline) - RESERVE).total_seconds()


def _earlier_start_s(output: str, info: ModelInfo) -> float | None:
    """Return how long the last run of this model into an output took to start; None if there was none."""
    return read_attempts(Folder(output)).start_s(info.model, info.dtype) if output else None


def _num_accelerators(engine: EngineBuilder) -> int:
    """Return the GPUs that actors of this engine may take."""
    if getattr(engine, "device", "cpu") == "cpu":
        return 0
    import torch  # the engine has imported it by now

    return torch.cuda.device_count()


def _num_cpus() -> int:
    """Return the cores that this process may use; on macOS those of the machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
