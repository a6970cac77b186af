"""The plan of a run as a value, its lines for the terminal, and its JSON object."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

from blip2_actor import ModelInfo, Status
from pipeline.caption_counts import CaptionCounts
from pipeline.inputs.file_kinds import Unread
from pipeline.inputs.size_estimate import SizeEstimate
from pipeline.plan.prediction import Prediction, predict
from pipeline.plan.sample import Sample
from pipeline.plan.stage_costs import StageCosts
from pipeline.progress import count, duration, format_bytes
from pipeline.run.bottleneck import Machines
from pipeline.settings.job_settings import CaptionSettings

MAX_ERRORS_SHOWN = 5
RAY_START_S = 10.0
"""Seconds that Ray and the imports of workers take before an engine starts, if no earlier start tells. A run
of 40 images of the demonstration takes 11.7 to 13.8 s on two idle cores (AMD EPYC, November 2026)."""
JSON_NAMES = {"min_rows": "least_rows", "max_rows": "most_rows"}
"""Fields of `SizeEstimate` that have another name in the JSON object, which never changes its keys."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What was found about the job, and what follows from it."""

    settings: CaptionSettings
    """The job that is planned."""
    info: ModelInfo
    size_estimate: SizeEstimate
    sample: Sample
    stage_costs: StageCosts
    unread: Unread
    """The files of the input that are not read."""
    notes: tuple[str, ...]
    """What a person must know of the formats of the images."""
    num_cpus: int
    """Cores of the measured machine that its process may use."""
    num_accelerators: int = 0
    """GPUs of the measured machine that actors of the engine may take."""
    price_per_hour: float | None = None
    """Price of a captioning actor with the cores that keep it busy."""
    place: str = "here"
    """The measured machine, in words."""
    earlier_start_s: float | None = None
    """Seconds that the last start with this model took, as the output has recorded it."""
    deadline: str | None = None
    """The deadline as it was given."""
    deadline_s: float | None = None
    """Seconds from the plan to the moment at which the job would begin to stop for its deadline."""

    @property
    def prediction(self) -> Prediction:
        return predict(
            self.stage_costs.costs,
            self.size_estimate.num_rows,
            self.num_cpus,
            self.settings.placement,
            self.start_s,
        )

    @property
    def start_s(self) -> float:
        """Seconds from the command to the first image."""
        if self.earlier_start_s is not None:
            return self.earlier_start_s
        return RAY_START_S + self.stage_costs.start_s

    @property
    def _cores(self) -> str:
        return count(self.num_cpus, "core")

    @property
    def _remedy(self) -> str:
        num_decoders = self.settings.placement.max_decode_actors or self.num_cpus
        machines = Machines(
            num_cpus=self.num_cpus,
            num_accelerators=self.num_accelerators,
            num_workers={"caption": 1, "decode": min(self.num_cpus, num_decoders)},
        )
        return machines.remedy(self.prediction.bottleneck)

    @property
    def by_status(self) -> Counter[str]:
        """Number of sampled rows by status."""
        return Counter(self.stage_costs.rows["status"].to_pylist())

    @property
    def failed_fraction(self) -> float:
        number = len(self.stage_costs.rows)
        return (number - self.by_status[Status.OK.value]) / number

    @property
    def flagged_fraction(self) -> float:
        """Share of the sample's captions that look wrong."""
        return CaptionCounts.of_rows(self.stage_costs.rows).flagged_fraction

    @property
    def meets_deadline(self) -> bool | None:
        """Whether the measured machine ends in time with one actor; None without a deadline."""
        return None if self.deadline_s is None else self.prediction.here_s <= self.deadline_s

    @property
    def cost(self) -> float | None:
        """What the whole input costs, in the currency of the price, if no actor ever waits."""
        return None if self.price_per_hour is None else self.prediction.actor_s / 3600 * self.price_per_hour

    @property
    def output_bytes(self) -> float:
        return (
            self.size_estimate.num_rows * self.stage_costs.row_bytes
            + self.size_estimate.num_shards * self.stage_costs.file_bytes
        )

    def lines(self) -> Iterator[str]:
        """Yield the lines of the plan for the terminal."""
        yield from self._input_lines()
        yield ""
        yield f"{'stage':9}{'images/s':>10}{'workers':>9}{'cores':>7}"
        for name, stage in self.prediction.stages.items():
            rate = f"{stage.images_per_s:,.1f}"
            yield f"{name:9}{rate:>10}{stage.workers_per_actor:>9,}{stage.cpus_per_actor:>7.1f}"
        yield "Images/s are of one worker. Workers and cores are those that keep one captioning actor busy."
        yield ""
        yield from self._prediction_lines()
        if self.stage_costs.quantization is not None:
            yield from self.stage_costs.quantization.lines()

    def _input_lines(self) -> Iterator[str]:
        size, costs = self.size_estimate, self.stage_costs
        num_bytes = "" if size.num_bytes is None else f", {format_bytes(size.num_bytes)}"
        yield f"input     {count(size.num_shards, 'shard')}{num_bytes}, {_format_rows(size)}"
        yield from (f"          {line}" for line in (*self.unread.lines(), *self.notes))
        counts = ", ".join(f"{number:,} {status}" for status, number in self.by_status.most_common())
        sample = f"{count(len(costs.rows), 'row')} of {count(len(self.sample.shards), 'shard')}"
        yield f"sample    {sample}: {counts}"
        yield from (f"          {line}" for line in self._error_lines())
        yield f"model     {self.info.model} ({self.info.dtype}), ready after {duration(costs.start_s)}"

    def _error_lines(self) -> Iterator[str]:
        rows = self.stage_costs.rows.select(["key", "shard", "status", "error"]).to_pylist()
        failed = [row for row in rows if row["status"] != Status.OK.value]
        for row in failed[:MAX_ERRORS_SHOWN]:
            yield f"{row['shard']} {row['key']}: {row['status']}: {row['error']}"
        if len(failed) > MAX_ERRORS_SHOWN:
            yield f"... and {len(failed) - MAX_ERRORS_SHOWN:,} more"
        yield from (f"partial: {reason}" for reason in self.sample.partial)

    def _prediction_lines(self) -> Iterator[str]:
        prediction = self.prediction
        yield (
            f"an actor  {duration(prediction.actor_s)} for the whole input if it never waits; "
            f"{count(prediction.decode_workers_per_actor, 'decode worker')} and "
            f"{prediction.cpus_per_actor:.1f} cores keep it busy"
        )
        num_actors = self.settings.placement.max_actors
        if num_actors and num_actors > 1:
            num_cores = num_actors * prediction.cpus_per_actor
            yield (
                f"{num_actors:,} actors".ljust(10)
                + f"{duration(prediction.actor_s / num_actors)}, with {num_cores:,.1f} cores"
            )
        recorded = "" if self.earlier_start_s is None else ", as in the last run of this output"
        yield (
            f"{self.place:10}{duration(prediction.here_s)} with one actor on {self._cores}, "
            f"{duration(self.start_s)} of it start-up{recorded}; "
            f"bottleneck: {prediction.bottleneck}; {self._remedy}"
        )
        if self.cost is not None:
            rows = self.size_estimate.num_rows
            yield (
                f"cost      {self.cost:,.2f} for the whole input at {self.price_per_hour:g} per hour of an "
                f"actor, {1e6 * self.cost / rows:,.2f} per million rows; starts and idle machines come on top"
            )
        num_files = self.size_estimate.num_shards
        yield f"output    about {format_bytes(self.output_bytes)} in {count(num_files, 'Parquet file')}"
        if self.deadline_s is not None:
            yield f"deadline  {self.deadline}, {self._what_meets(self.deadline_s)}"
        if self.failed_fraction > self.settings.max_failed_fraction:
            yield (
                f"failures  {self.failed_fraction:.1%} of the sample; this is above --max-failed-fraction "
                f"{self.settings.max_failed_fraction:g}, so the run would end with exit status 2"
            )
        if self.flagged_fraction > self.settings.max_flagged_fraction:
            yield (
                f"flags     {self.flagged_fraction:.1%} of the sample's captions; this is above "
                f"--max-flagged-fraction {self.settings.max_flagged_fraction:g}, so the run would end with "
                "exit status 2"
            )

    def _what_meets(self, deadline_s: float) -> str:
        if self.meets_deadline:
            return f"which one actor meets on {self._cores}"
        left_s = deadline_s - self.start_s
        if left_s <= 0:
            return "before which no image is captioned, because of the start-up; give a later --deadline"
        not_here = f"which one actor does not meet on {self._cores}"
        num_actors = math.ceil(self.prediction.actor_s / left_s)
        if num_actors == 1:
            return f"{not_here}, where {self.prediction.bottleneck} is the bottleneck"
        return f"{not_here}; {num_actors:,} actors that never wait would"

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain values for `--json`; programs read it, so its keys never change."""
        effect = self.stage_costs.quantization
        return {
            "model": dataclasses.asdict(self.info),
            "input": {
                JSON_NAMES.get(name, name): value
                for name, value in dataclasses.asdict(self.size_estimate).items()
            },
            "unread": dataclasses.asdict(self.unread),
            "sample": {"num_rows": len(self.stage_costs.rows), "by_status": dict(self.by_status)},
            "prediction": dataclasses.asdict(self.prediction),
            "decode_workers_per_actor": self.prediction.decode_workers_per_actor,
            "output_bytes": round(self.output_bytes),
            "start_s": self.stage_costs.start_s,
            "num_cpus": self.num_cpus,
            "place": self.place,
            "price_per_hour": self.price_per_hour,
            "cost": self.cost,
            "meets_deadline": self.meets_deadline,
            "quantization": None if effect is None else dataclasses.asdict(effect),
        }


def _format_rows(size: SizeEstimate) -> str:
    if size.is_counted:
        return count(size.num_rows, "row")
    return f"about {size.num_rows:,} rows ({size.min_rows:,} to {size.max_rows:,}), estimated from a sample"
