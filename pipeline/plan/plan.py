"""`blip2 plan`: list, sample, time each stage on the sample, and say what the whole would take."""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

from blip2_actor import EngineBuilder, ModelInfo, Status
from pipeline.exit_status import before_work, errors_to_exit_status
from pipeline.inputs.datasource import check_options
from pipeline.inputs.listing import list_shards
from pipeline.inputs.size_estimate import SizeEstimate, estimate_size
from pipeline.plan.prediction import Prediction, predict
from pipeline.plan.sample import Sample, take_sample
from pipeline.plan.stage_costs import StageCosts, measure_stage_costs
from pipeline.progress import Console, duration
from pipeline.run.bottleneck import REMEDIES
from pipeline.settings.settings import AnyPlanSettings, CaptionSettings

MAX_ERRORS_SHOWN = 5


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that was found."""

    settings: CaptionSettings
    """The job that is planned."""
    info: ModelInfo
    size_estimate: SizeEstimate
    sample: Sample
    stage_costs: StageCosts
    num_cpus: int

    @property
    def prediction(self) -> Prediction:
        return predict(
            self.stage_costs.costs, self.size_estimate.num_rows, self.num_cpus, self.settings.placement
        )

    @property
    def by_status(self) -> Counter[str]:
        return Counter(self.stage_costs.rows["status"].to_pylist())

    @property
    def failed_fraction(self) -> float:
        return 1 - self.by_status[Status.OK.value] / len(self.stage_costs.rows)

    @property
    def output_bytes(self) -> float:
        return (
            self.size_estimate.num_rows * self.stage_costs.row_bytes
            + self.size_estimate.num_shards * self.stage_costs.file_bytes
        )


@errors_to_exit_status
def plan(settings: AnyPlanSettings, engine: EngineBuilder | None = None) -> int:
    """Print a plan."""
    with before_work():  # a plan starts nothing: all that it refuses, the job would refuse
        found = make_plan(settings, engine)
    console = Console()
    if settings.json:
        console.say(json.dumps(_to_dict(found)))
        return 0
    for line in lines(found):
        console.say(line)
    return 0


def make_plan(settings: AnyPlanSettings, engine: EngineBuilder | None = None) -> Plan:
    """List, sample and try.

    Raises:
        ValueError, OSError: as the job would; or nothing in the sample can be decoded.
    """
    job = settings.job()
    engine = engine or job.builder
    info = engine.info()
    job.outputs.check(engine, info, job.prompt, job.generation)
    shards = list_shards(job.input, format=job.format, limit=job.limit)
    check_options(shards, job.read_options)
    sample = take_sample(shards, job.read_options, settings.sample)
    return Plan(
        settings=job,
        info=info,
        size_estimate=estimate_size(shards, job.limit),
        sample=sample,
        stage_costs=measure_stage_costs(job, engine, info.image_size_px, sample),
        num_cpus=len(os.sched_getaffinity(0)),
    )


def lines(found: Plan) -> Iterator[str]:
    """The plan for people."""
    size_estimate, stage_costs, prediction = found.size_estimate, found.stage_costs, found.prediction
    size = "" if size_estimate.num_bytes is None else f", {num_bytes(size_estimate.num_bytes)}"
    yield f"input     {size_estimate.num_shards:,} shards{size}, {_rows(size_estimate)}"
    counts = ", ".join(f"{n:,} {status}" for status, n in found.by_status.most_common())
    yield f"sample    {len(stage_costs.rows):,} rows of {len(found.sample.shards):,} shards: {counts}"
    yield from (f"          {line}" for line in _errors(found))
    yield f"model     {found.info.model} ({found.info.dtype}), ready after {duration(stage_costs.start_s)}"
    yield ""
    yield f"{'stage':9}{'images/s of one':>17}{'workers per captioning actor':>32}{'their CPU cores':>18}"
    for name, stage in prediction.stages.items():
        rate = f"{stage.images_per_s:,.1f}"
        yield f"{name:9}{rate:>17}{stage.workers_per_actor:>32,}{stage.cpus_per_actor:>18.1f}"
    yield ""
    yield (
        f"an actor  {duration(prediction.actor_s)} for everything, if it never waits: "
        f"{prediction.decode_workers_per_actor:,} decoding workers and {prediction.cpus_per_actor:.1f} cores "
        "keep it busy"
    )
    actors = found.settings.placement.max_actors
    if actors and actors > 1:
        yield (
            f"{actors:,} actors".ljust(10)
            + f"{duration(prediction.actor_s / actors)}, with {actors * prediction.cpus_per_actor:,.1f} cores"
        )
    yield (
        f"here      {duration(prediction.here_s)} with one actor on {found.num_cpus:,} cores; bottleneck: "
        f"{prediction.bottleneck}; {REMEDIES[prediction.bottleneck]}"
    )
    yield f"output    about {num_bytes(found.output_bytes)} in {size_estimate.num_shards:,} Parquet files"
    if found.failed_fraction > found.settings.max_failed_fraction:
        yield (
            f"failures  {found.failed_fraction:.1%} of the sample; above --max-failed-fraction "
            f"{found.settings.max_failed_fraction:g}, the run would end with exit status 2"
        )


def num_bytes(number: float) -> str:
    """Bytes for people, in powers of 1000."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "bytes" else f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:,.3g} TB" if number < 1000 else f"{number:,.0f} TB"


def _rows(size: SizeEstimate) -> str:
    if size.is_counted:
        return f"{size.num_rows:,} rows"
    return f"about {size.num_rows:,} rows ({size.min_rows:,} to {size.max_rows:,}), estimated from bytes"


def _errors(found: Plan) -> Iterator[str]:
    rows = found.stage_costs.rows.select(["key", "shard", "status", "error"]).to_pylist()
    failed = [row for row in rows if row["status"] != Status.OK.value]
    for row in failed[:MAX_ERRORS_SHOWN]:
        yield f"{row['shard']} {row['key']}: {row['status']}: {row['error']}"
    if len(failed) > MAX_ERRORS_SHOWN:
        yield f"... and {len(failed) - MAX_ERRORS_SHOWN:,} more"
    yield from (f"partial: {reason}" for reason in found.sample.partial)


def _to_dict(found: Plan) -> dict[str, Any]:
    """For machines."""
    return {
        "model": dataclasses.asdict(found.info),
        "input": dataclasses.asdict(found.size_estimate),
        "sample": {"num_rows": len(found.stage_costs.rows), "by_status": dict(found.by_status)},
        "prediction": dataclasses.asdict(found.prediction),
        "decode_workers_per_actor": found.prediction.decode_workers_per_actor,
        "output_bytes": round(found.output_bytes),
        "start_s": found.stage_costs.start_s,
        "num_cpus": found.num_cpus,
    }
