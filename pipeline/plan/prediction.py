"""Predict hours, workers and the bottleneck from what each stage costs a row.

This is arithmetic; nothing is run. The model: the stages work at the same time, so the slowest one sets
the pace, unless all of them together need more CPU time than the cores have.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.placement.reservations import MIN_OPEN_SHARDS
from pipeline.plan.cost import Cost
from pipeline.settings.placement import Placement


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """What one stage needs to keep one captioning actor busy all the time."""

    images_per_s: float
    """Images per second of one worker."""
    workers_per_actor: int
    """Workers per captioning actor."""
    cpus_per_actor: float
    """Cores that these workers use."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a run will take."""

    stages: Mapping[str, StagePlan]
    actor_s: float
    """Seconds with one captioning actor that never waits."""
    cpus_per_actor: float
    """Cores that keep one captioning actor busy."""
    here_s: float
    """Seconds on this machine, with one captioning actor, from the command to its end."""
    bottleneck: str
    """The stage that limits the pace on this machine."""

    @property
    def decode_workers_per_actor(self) -> int:
        return self.stages["decode"].workers_per_actor


def predict(
    costs: Mapping[str, Cost], num_rows: int, num_cpus: int, placement: Placement, start_s: float = 0.0
) -> Prediction:
    """Predict what a run of `num_rows` rows will take.

    Args:
        costs: the cost of one row by stage: read, decode, caption and write. It is the cost in one actor
            for caption, and in one worker for the others.
        num_rows: rows of the input.
        num_cpus: cores of this machine.
        placement: the limits on the numbers of actors.
        start_s: seconds from the command to the first image.
    """
    caption_s = costs["caption"].wall_s
    workers = {
        "read": max(MIN_OPEN_SHARDS, num_cpus),
        "decode": min(num_cpus, placement.max_decode_actors or num_cpus),
        "caption": 1,
        "write": placement.calls_per_actor,
    }
    row_s_by_stage = {stage: cost.wall_s / workers[stage] for stage, cost in costs.items()}
    bottleneck = max(row_s_by_stage, key=lambda stage: row_s_by_stage[stage])
    row_s = row_s_by_stage[bottleneck]
    cpu_s = sum(cost.cpu_s for cost in costs.values())
    if cpu_s / num_cpus > row_s:
        row_s = cpu_s / num_cpus
        bottleneck = max(costs, key=lambda stage: costs[stage].cpu_s)
    return Prediction(
        stages={
            stage: StagePlan(
                images_per_s=1 / cost.wall_s,
                workers_per_actor=1 if stage == "caption" else math.ceil(cost.wall_s / caption_s),
                cpus_per_actor=cost.cpu_s / caption_s,
            )
            for stage, cost in costs.items()
        },
        actor_s=num_rows * caption_s,
        cpus_per_actor=cpu_s / caption_s,
        here_s=start_s + num_rows * row_s,
        bottleneck=bottleneck,
    )
