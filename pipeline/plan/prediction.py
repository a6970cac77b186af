"""From what each stage costs a row to hours, workers and the bottleneck: arithmetic, nothing is run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.plan.sample import Cost
from pipeline.run.stream import MIN_OPEN_SHARDS
from pipeline.settings.placement import Placement


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """One stage, where a captioning actor is to be busy all the time."""

    images_per_s: float
    """Of one worker."""
    workers_per_actor: int
    """Beside one captioning actor."""
    cpus_per_actor: float


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a run will take."""

    stages: Mapping[str, StagePlan]
    actor_s: float
    """On one captioning actor that never waits."""
    cpus_per_actor: float
    """Cores that keep it so."""
    here_s: float
    """On this machine, with one captioning actor."""
    bottleneck: str
    """Of this machine."""

    @property
    def decode_workers_per_actor(self) -> int:
        return self.stages["decode"].workers_per_actor


def predict(costs: Mapping[str, Cost], num_rows: int, num_cpus: int, placement: Placement) -> Prediction:
    """Predict a run of so many rows.

    Args:
        costs: by stage: read, decode, caption and write; of caption in one actor, of others in one worker.
        num_cpus: of this machine.
    """
    row_s = costs["caption"].wall_s
    workers = {
        "read": max(MIN_OPEN_SHARDS, num_cpus),
        "decode": min(num_cpus, placement.max_decode_actors or num_cpus),
        "caption": 1,
        "write": placement.calls_per_actor,
    }
    # The slowest stage sets the pace, or all cores together do.
    paces = {stage: cost.wall_s / workers[stage] for stage, cost in costs.items()}
    bottleneck = max(paces, key=lambda stage: paces[stage])
    here_row_s = paces[bottleneck]
    cpu_s = sum(cost.cpu_s for cost in costs.values())
    if cpu_s / num_cpus > here_row_s:
        here_row_s = cpu_s / num_cpus
        bottleneck = max(costs, key=lambda stage: costs[stage].cpu_s)
    return Prediction(
        stages={
            stage: StagePlan(
                images_per_s=1 / cost.wall_s,
                workers_per_actor=1 if stage == "caption" else math.ceil(cost.wall_s / row_s),
                cpus_per_actor=cost.cpu_s / row_s,
            )
            for stage, cost in costs.items()
        },
        actor_s=num_rows * row_s,
        cpus_per_actor=cpu_s / row_s,
        here_s=num_rows * here_row_s,
        bottleneck=bottleneck,
    )
